"""One conversation of Qwen2-Audio, from Hugging Face's form to a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.mimo.data import Sample
from megatron.mimo.models.common.audio_tower import audio_items
from megatron.mimo.models.common.tokens import labels_or, read_tokens

__all__ = ["sample"]


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids``, ``input_features`` and ``feature_attention_mask``."""
    tokens_L, given = read_tokens(features, "input_features", "feature_attention_mask", name=name)
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.audio_token_index),
        media=audio_items(config.audio_config, given, modality="audio", name=name),
    )
