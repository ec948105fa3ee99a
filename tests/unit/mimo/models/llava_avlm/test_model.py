"""llava_avlm for transformers: it saves, loads by its name and generates; and its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.models import family_of, load_family, read_hf_config


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, dict[str, Tensor]]:
    """Configuration, reference model, and a conversation with images and clips."""
    family = load_family("llava_avlm")
    config = family.tiny()
    torch.manual_seed(1)
    model = family.reference(config).eval()
    generator = torch.Generator().manual_seed(4)
    while True:
        example = family.example(config, generator)
        if {"pixel_values", "input_features"} <= example.keys():
            return config, model, example


def test_a_saved_model_loads_by_its_name_and_generates(
    made: tuple[Any, Any, dict[str, Tensor]], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config, model, example = made
    model.save_pretrained(tmp_path)
    family = family_of(read_hf_config(tmp_path))
    assert family.name == "llava_avlm"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    table = family.keys(config)
    known = {name for row in table.each() for name in row.hf}
    assert known <= names
    assert all(table.is_carried(name) for name in names - known)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**example).logits, model(**example).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = loaded.generate(**example, **settings)
    again = loaded.generate(**example, **settings, use_cache=False)
    assert cached.shape == (1, example["input_ids"].size(1) + 8)
    assert torch.equal(cached, again)
    blind = {**example, "pixel_values": example["pixel_values"] + 3}
    assert not torch.equal(cached, loaded.generate(**blind, **settings))


def test_rows_and_placeholders_have_to_agree(made: tuple[Any, Any, dict[str, Tensor]]) -> None:
    config, model, example = made
    tokens = example["input_ids"].clone()
    tokens[tokens == config.audio_token_index] = 9
    with pytest.raises(ValueError, match=r"0 audio tokens and \d+ rows"):
        model(**{**example, "input_ids": tokens})


def test_media_stand_in_the_order_of_their_placeholders(
    made: tuple[Any, Any, dict[str, Tensor]],
) -> None:
    config, _, _ = made
    family = load_family("llava_avlm")
    image, clip = config.image_token_index, config.audio_token_index
    features = {
        "input_ids": torch.tensor([[9, clip, clip, *[image] * 9, 9, clip, 9]]),
        "pixel_values": torch.zeros(1, 3, 24, 24),
        "input_features": torch.randn(2, 16, 60),
        "feature_attention_mask": (torch.arange(60) < torch.tensor([[3], [2]])).long(),
    }
    sample = family.sample(config, features)
    assert [item.modality for item in sample.media] == ["audio", "images", "audio"]
    assert [item.rows for item in sample.media] == [2, 9, 1]
    # Whisper attends to silence: it is given the whole window.
    assert sample.media[0].inputs["input_features"].shape == (16, 60)
    assert sample.is_label.tolist() == [True, *[False] * 11, True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_attention_mask": None}, "feature_attention_mask is missing"),
        ({"input_features": torch.zeros(1, 16, 59)}, r"input_features \[1, 16, 59\]"),
        (
            {"feature_attention_mask": (torch.arange(60) > 3).long()[None]},
            "clip 0: feature_attention_mask has 56 frames",
        ),
        ({"feature_attention_mask": torch.zeros(1, 60)}, "has 0 frames that are no silence"),
    ],
)
def test_clips_that_do_not_fit_are_refused(
    made: tuple[Any, Any, dict[str, Tensor]], change: dict[str, Any], message: str
) -> None:
    features = {
        "input_ids": torch.tensor([[9, 5, 5, 9]]),
        "input_features": torch.zeros(1, 16, 60),
        "feature_attention_mask": (torch.arange(60) < 3).long()[None],
    } | change
    given = {key: value for key, value in features.items() if value is not None}
    with pytest.raises(InputError, match=message):
        load_family("llava_avlm").sample(made[0], given, name="talk")
