"""qwen2_audio: names of its files, samples, and clips that are too short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.models import load_family

MELS, WINDOW = 16, 60
TOKEN = 4


def clips(*lengths: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(len(lengths), MELS, WINDOW),
        "feature_attention_mask": (torch.arange(WINDOW) < torch.tensor(lengths)[:, None]).long(),
    }


def sample(features: dict[str, Tensor]) -> Any:
    family = load_family("qwen2_audio")
    return family.sample(family.tiny(), features, name="talk")


def test_every_saved_weight_has_a_row_by_any_of_its_names(tmp_path: Any) -> None:
    from safetensors import safe_open

    family = load_family("qwen2_audio")
    config = family.tiny()
    model = family.reference(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    table = family.keys(config)
    published = {name for row in table.each() for name in row.hf}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in published
    assert {table.canonical(name) for name in saved} == published
    assert {table.canonical(name) for name in model.state_dict()} == published
    # As transformers 5.20 saves them, whatever this one does.
    one, two = "language_model.model.", "language_model.model.model."
    doubled = {name.replace(one, two) for name in published}
    assert {table.canonical(name) for name in doubled} == published


def test_clips_keep_the_frames_that_matter() -> None:
    tokens = torch.tensor([[9, *[TOKEN] * 4, 8, *[TOKEN] * 15, 7]])
    made = sample({"input_ids": tokens, **clips(17, WINDOW)})
    assert [item.rows for item in made.media] == [4, 15]
    shapes = [tuple(item.inputs["input_features"].shape) for item in made.media]
    assert shapes == [(MELS, 19), (MELS, WINDOW)]
    assert [int(item.inputs["lengths"]) for item in made.media] == [17, WINDOW]
    assert made.is_label.sum() == 3


def test_a_conversation_without_clips() -> None:
    made = sample({"input_ids": torch.tensor([[9, 8]])})
    assert made.media == ()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (clips(2), "clip 0: feature_attention_mask has 2 frames .* at least 3"),
        ({"input_features": torch.zeros(1, MELS, WINDOW)}, "feature_attention_mask is missing"),
        (
            {**clips(9), "input_features": torch.zeros(1, MELS, 30)},
            r"\[1, 16, 30\].*expected \[1, 16, 60\] .* whole window",
        ),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, r"features \['pixel_values'\] are not known"),
    ],
)
def test_refusals(features: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample({"input_ids": torch.tensor([[9, TOKEN]]), **features})


def test_language_models_that_are_not_known_are_refused() -> None:
    from transformers import GemmaConfig

    from megatron.core.models.mimo.errors import UnsupportedError

    family = load_family("qwen2_audio")
    config = family.tiny()
    config.text_config = GemmaConfig()
    with pytest.raises(UnsupportedError, match="model_type is 'gemma'"):
        family.arguments(config)
