from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data import Sample
from megatron.mimo.data.digits import scanned as data


def dataset(split: str = "train", seed: int = 1, samples: int = 400) -> data.DigitsDataset:
    return data.DigitsDataset(split=split, samples=samples, seed=seed, rows_per_image=4)


def scans() -> Any:
    """scikit-learn's, whose import takes seconds."""
    return importlib.import_module("sklearn.datasets").load_digits()


def same(one: Sample, other: Sample) -> bool:
    return (
        torch.equal(one.token_ids, other.token_ids)
        and len(one.media) == len(other.media)
        and all(
            torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])
            for a, b in zip(one.media, other.media, strict=True)
        )
    )


def test_the_split_is_disjoint_complete_and_stratified() -> None:
    train, held_out = (data.load_images(held_out=side) for side in (False, True))
    targets = torch.tensor(scans().target)
    assert sorted(train.source.tolist() + held_out.source.tolist()) == list(range(1797))
    for images in (train, held_out):
        assert torch.equal(images.values, targets[images.source])
    for digit in range(10):
        share = (held_out.values == digit).sum() / (targets == digit).sum()
        assert share == pytest.approx(data.HELD_OUT, abs=0.01)
    # no held-out scan has a twin among the training images
    assert torch.cdist(train.pixels.flatten(1), held_out.pixels.flatten(1)).min() > 0


def test_pixels_are_the_scans() -> None:
    images = data.load_images(held_out=True)
    expected = torch.tensor(scans().images)[images.source] / 16
    assert (images.pixels[:, 0, 0] - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_sample_depends_on_seed_split_and_index_alone(split: str) -> None:
    one, again, longer = dataset(split), dataset(split), dataset(split, samples=500)
    other = dataset(split, seed=2)
    for index in (3, 0, 399):
        assert same(one[index], again[index])
        assert same(one[index], longer[index])
    assert not all(same(one[index], other[index]) for index in range(5))
    assert not all(same(one[index], one[index + 5]) for index in range(5))


def test_valid_and_test_ask_other_questions() -> None:
    assert not all(same(dataset("valid")[index], dataset("test")[index]) for index in range(5))


def test_held_out_images_are_shown_as_they_are() -> None:
    scans = {tuple(scan.flatten().tolist()) for scan in data.load_images(held_out=True).pixels}
    shown = [item.inputs["pixel_values"] for sample in map(dataset("test").__getitem__, range(50))
             for item in sample.media]  # fmt: skip
    assert all(tuple(pixels.flatten().tolist()) in scans for pixels in shown)


def test_questions_have_their_answer() -> None:
    scans = data.load_images(held_out=True)
    digit_of = {
        tuple(scan.flatten().tolist()): int(value)
        for scan, value in zip(scans.pixels, scans.values, strict=True)
    }
    counts, text_only = set(), 0
    for index in range(400):
        sample = held_out()[index]
        names = [data.VOCABULARY[token] for token in sample.token_ids]
        answer = [name for name, flag in zip(names, sample.is_label, strict=True) if flag]
        assert answer[-1] == "<end>"
        assert names[len(names) - len(answer) - 1] == "->"
        if sample.media:
            shown = [
                digit_of[tuple(i.inputs["pixel_values"].flatten().tolist())] for i in sample.media
            ]
            assert names.count("<image>") == 4 * len(shown)
            counts.add(len(shown))
        else:
            shown = [data.WORDS.index(name) for name in names if name in data.WORDS]
            text_only += 1
        assert "".join(answer[:-1]) == "".join(map(str, shown))
        assert len(names) <= 4 * 5 + len(data.QUESTION) + 5
    assert counts == {1, 2, 3, 4}
    assert 20 <= text_only <= 65  # one in ten, within 3.5 standard deviations


@cache
def held_out() -> data.DigitsDataset:
    return dataset("test")


def test_augmentation_keeps_the_range_and_leaves_a_likeness() -> None:
    side = data.load_images(held_out=False)
    images, values = side.pixels[::20, 0], side.values[::20]
    variants = data.augment(images, variants=8, seed=3)
    assert variants.shape == (len(images), 8, 1, 8, 8)
    assert variants.min() >= 0
    assert variants.max() <= 1
    assert torch.equal(variants, data.augment(images, variants=8, seed=3))
    assert not torch.equal(variants, data.augment(images, variants=8, seed=4))
    nearest = torch.cdist(variants.flatten(0, 1).flatten(1), images.flatten(1)).argmin(dim=1)
    same_digit = values[nearest].view(-1, 8) == values[:, None]
    assert same_digit.float().mean() > 0.8


def test_decode_shows_everything_before_the_end() -> None:
    seven, two = data.encode("7", "2")
    assert data.decode([seven, two, data.END, seven]) == "72"
    assert data.decode([seven]) == "7"
    assert data.decode([seven, *data.encode("is"), 99]) == "7is<99>"


def test_question_text() -> None:
    words = next(sample for sample in map(held_out().__getitem__, range(400)) if not sample.media)
    spelt = [data.VOCABULARY[token] for token in words.token_ids if token >= data.TOKEN_ID["zero"]]
    assert data.question_text(words) == f"“{' '.join(spelt)}” what number is this?"
    assert data.question_text(held_out()[0]) == "what number is this?"


def test_score() -> None:
    def answered(digits: str) -> list[int]:
        return [*data.encode(*digits), data.END]

    images = [
        sample for sample in map(held_out().__getitem__, range(400)) if len(sample.media) == 3
    ][:4]
    words = [sample for sample in map(held_out().__getitem__, range(400)) if not sample.media][:2]
    truth = [data.decode(s.token_ids[s.is_label].tolist()) for s in images + words]
    wrong_first = str((int(truth[1][0]) + 1) % 10) + truth[1][1:]
    said = [truth[0], wrong_first, truth[2][:2], truth[3] + "0", truth[4], "99999"]
    result = data.score(images + words, [answered(text) for text in said])
    assert result["digit_accuracy"] == pytest.approx((3 + 2 + 2 + 3) / (3 + 3 + 3 + 4))
    assert result["exact_match"] == pytest.approx(1 / 4)
    assert result["text_exact_match"] == pytest.approx(1 / 2)
    assert result["test_samples"] == 6
    assert math.isnan(data.score(words, [[], []])["exact_match"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "training"}, "split 'training'; expected one of"),
        ({"samples": -1}, "samples=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"rows_per_image": 0}, "rows_per_image=0"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"split": "train", "samples": 1, "seed": 0, "rows_per_image": 4} | change
    with pytest.raises(ConfigError, match=message):
        data.DigitsDataset(**arguments)


def test_index_beyond_the_end() -> None:
    with pytest.raises(IndexError, match="sample 400 of 400"):
        held_out()[400]
