from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from megatron.core.models.mimo.errors import (
    ConfigError,
    InputError,
    MimoError,
    PlaceholderMismatchError,
)
from megatron.mimo.data import MediaFormat, MediaItem, Sample, SampleCollator

IMAGE, CLIP, PAD, VOCAB, LENGTH = 90, 91, 3, 50, 12
COLLATE = SampleCollator(
    seq_length=LENGTH,
    vocab_size=VOCAB,
    pad_id=PAD,
    special_token_ids={"images": IMAGE, "audio": CLIP},
    media_formats={
        "images": MediaFormat(encoder="vit", inputs={"pixels": (torch.float32, (1, 2, 2))}),
        "audio": MediaFormat(
            encoder="ear",
            inputs={"waves": (torch.float32, (5,)), "rate": (torch.int64, ())},
        ),
    },
)


def image(value: float = 0.0, rows: int = 2) -> MediaItem:
    pixels = torch.full((1, 2, 2), value)
    return MediaItem(modality="images", encoder="vit", inputs={"pixels": pixels}, rows=rows)


def clip(value: float = 0.0, rows: int = 1) -> MediaItem:
    inputs = {"waves": torch.full((5,), value), "rate": torch.tensor(int(value))}
    return MediaItem(modality="audio", encoder="ear", inputs=inputs, rows=rows)


def sample(ids: list[int], labels: list[int] = (), media: tuple = (), name: str = "s/7") -> Sample:
    return Sample(
        name=name,
        token_ids=torch.tensor(ids, dtype=torch.int64),
        is_label=torch.tensor([at in labels for at in range(len(ids))], dtype=torch.bool),
        media=media,
    )


def random_samples(seed: int, count: int) -> list[Sample]:
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        ids, media = [], []
        for _ in range(draw.randrange(4)):
            kind = draw.choice("tic")
            if kind == "t":
                ids.append(draw.randrange(VOCAB))
            elif kind == "i":
                media.append(image(draw.random()))
                ids += [IMAGE] * 2
            else:
                media.append(clip(float(draw.randrange(9))))
                ids.append(CLIP)
        ids += [draw.randrange(VOCAB) for _ in range(draw.randrange(1, LENGTH - len(ids) + 1))]
        labels = [at for at, token in enumerate(ids) if token < VOCAB and draw.random() < 0.5]
        samples.append(sample(ids, labels, tuple(media), name=str(number)))
    return samples


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_tokens(seed: int) -> None:
    samples = random_samples(seed, count=6)
    batch = COLLATE(samples)
    for row, one in enumerate(samples):
        ids, flags = one.token_ids.tolist(), one.is_label.tolist()
        for at in range(LENGTH):
            assert batch["input_ids"][row, at] == (ids[at] if at < len(ids) else PAD)
            assert batch["position_ids"][row, at] == at
            is_label = at + 1 < len(ids) and flags[at + 1]
            assert batch["loss_mask"][row, at] == float(is_label)
            assert batch["labels"][row, at] == (ids[at + 1] if is_label else PAD)
    for modality, encoder, names in (
        ("images", "vit", ["pixels"]),
        ("audio", "ear", ["waves", "rate"]),
    ):
        items = [item for one in samples for item in one.media if item.modality == modality]
        if not items:
            assert modality not in batch["modality_inputs"]
            continue
        for name in names:
            stacked = batch["modality_inputs"][modality][encoder][name]
            assert stacked.shape[0] == len(items)
            for got, item in zip(stacked, items, strict=True):
                assert torch.equal(got, item.inputs[name])
    assert batch["alignment_plan"].counts == {
        "images": int((batch["input_ids"] == IMAGE).sum()),
        "audio": int((batch["input_ids"] == CLIP).sum()),
    }
    assert {name: batch[name].dtype for name in ("input_ids", "labels", "loss_mask")} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
    }


def test_text_only_micro_batch_has_no_modality_inputs() -> None:
    assert COLLATE([sample([1, 2], [1]), sample([4])])["modality_inputs"] == {}


def test_sample_of_full_length_fits() -> None:
    batch = COLLATE([sample(list(range(LENGTH)), [LENGTH - 1])])
    assert batch["labels"][0, LENGTH - 2] == LENGTH - 1
    assert batch["loss_mask"].sum() == 1


def test_prompt_ends_before_the_first_label() -> None:
    prompt = sample([IMAGE, IMAGE, 4, 5, 6], [3, 4], (image(),)).prompt()
    assert prompt.token_ids.tolist() == [IMAGE, IMAGE, 4]
    assert not prompt.is_label.any()
    assert len(prompt.media) == 1
    assert sample([1, 2]).prompt().token_ids.tolist() == [1, 2]


BAD_SAMPLES = {
    "too few placeholders": (
        sample([IMAGE] * 3 + [1], media=(image(), image())),
        r"sample s/7: 3 placeholders .*'images'.* yield 4 rows; media item 1 needs 2 and finds 1",
    ),
    "no placeholders": (
        sample([1], media=(clip(), image())),
        r"0 placeholders .*'images'.* yield 2 rows; media item 1 needs 2 and finds 0",
    ),
    "too many placeholders": (
        sample([IMAGE] * 5, media=(image(), image())),
        r"5 placeholders .*'images'.* yield 4 rows; no media item is left for the last 1",
    ),
    "negative id": (sample([1, -4]), r"sample s/7: token 1 has id -4; expected 0 <= id < 50"),
    "id beyond vocabulary": (sample([50]), r"token 0 has id 50; expected 0 <= id < 50"),
    "too long": (
        sample([1] * 11 + [IMAGE] * 4, media=(image(), image())),
        r"15 tokens, 3 more than seq_length 12 \(3 of the surplus are placeholders",
    ),
    "empty": (sample([]), r"no tokens"),
    "label on placeholder": (
        sample([IMAGE, IMAGE], [1], (image(),)),
        r"token 1 is a placeholder and is marked as a label",
    ),
    "int32 ids": (
        replace(sample([1]), token_ids=torch.tensor([1], dtype=torch.int32)),
        r"token_ids is torch.int32 \[1\]; expected torch.int64",
    ),
    "flags of another length": (
        replace(sample([1, 2]), is_label=torch.tensor([True])),
        r"is_label is torch.bool \[1\]; expected torch.bool",
    ),
    "2-D ids": (
        replace(sample([1]), token_ids=torch.tensor([[1]])),
        r"token_ids is torch.int64 \[1, 1\]",
    ),
    "wrong media dtype": (
        sample(
            [IMAGE] * 2, media=(replace(image(), inputs={"pixels": torch.ones(1, 2, 2).int()}),)
        ),
        r"media item 0: pixels is torch.int32 \[1, 2, 2\]; expected torch.float32 \[1, 2, 2\]",
    ),
    "wrong media shape": (
        sample(
            [CLIP] + [IMAGE] * 2,
            media=(clip(), replace(image(), inputs={"pixels": torch.ones(2, 2)})),
        ),
        r"sample s/7, media item 1: pixels is torch.float32 \[2, 2\]; expected .* \[1, 2, 2\]",
    ),
    "misspelt argument": (
        sample([IMAGE] * 2, media=(replace(image(), inputs={"pixel": torch.ones(1, 2, 2)}),)),
        r"inputs \['pixel'\]; expected \['pixels'\]",
    ),
    "unknown modality": (
        sample([IMAGE] * 2, media=(replace(image(), modality="image"),)),
        r"unknown modality 'image'; expected one of \['audio', 'images'\]",
    ),
    "unknown encoder": (
        sample([IMAGE] * 2, media=(replace(image(), encoder="clip"),)),
        r"encoder 'clip'; expected 'vit'",
    ),
    "no rows": (sample([1], media=(image(rows=0),)), r"yields 0 rows; expected at least one"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_bad_sample_is_named(bad: Sample, message: str) -> None:
    with pytest.raises(InputError, match=message):
        COLLATE([sample([1]), bad])


def test_mismatch_carries_its_numbers() -> None:
    with pytest.raises(PlaceholderMismatchError) as caught:
        COLLATE([sample([IMAGE] * 3, media=(image(),))])
    assert (caught.value.modality, caught.value.placeholders, caught.value.rows) == ("images", 3, 2)
    assert isinstance(caught.value, MimoError)
    assert isinstance(caught.value, ValueError)


def test_a_surplus_in_one_sample_does_not_make_up_for_another() -> None:
    short, long = sample([IMAGE], media=(image(),)), sample([IMAGE] * 3, media=(image(),))
    with pytest.raises(PlaceholderMismatchError):
        COLLATE([short, long])


def test_empty_micro_batch() -> None:
    with pytest.raises(InputError, match="0 samples"):
        COLLATE([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 0}, "seq_length is 0"),
        ({"pad_id": 50}, "pad_id 50 is outside the vocabulary"),
        ({"special_token_ids": {"images": PAD, "audio": CLIP}}, "also a placeholder"),
        ({"special_token_ids": {"images": IMAGE}}, "expected the same modalities"),
    ],
)
def test_bad_configuration(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(COLLATE, **change)
