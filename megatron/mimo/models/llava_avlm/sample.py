"""One conversation of LLaVA with ears, from Hugging Face's form to a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.mimo.data import MediaItem, Sample
from megatron.mimo.models.common.audio_tower import audio_items
from megatron.mimo.models.common.llava_kind import conversation_images
from megatron.mimo.models.common.tokens import labels_or, read_tokens

__all__ = ["sample"]

_CLIPS = ("input_features", "feature_attention_mask")


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``pixel_values``, ``input_features`` and ``feature_attention_mask``."""
    clips = {key: value for key, value in features.items() if key in _CLIPS}
    rest = {key: value for key, value in features.items() if key not in clips}
    tokens_L, given = read_tokens(rest, "pixel_values", name=name)
    is_label_L = labels_or(is_label, tokens_L, config.image_token_index)
    if is_label is None:
        is_label_L = is_label_L & (tokens_L != config.audio_token_index)
    seen = conversation_images(config, given)
    heard = audio_items(config.audio_config, clips, modality="audio", name=name)
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=is_label_L,
        media=_in_order(
            tokens_L, {config.image_token_index: seen, config.audio_token_index: heard}
        ),
    )


def _in_order(
    tokens_L: Tensor, media_of: Mapping[int, Sequence[MediaItem]]
) -> tuple[MediaItem, ...]:
    """Items by the place of their first placeholder; those that have none come last."""
    placed = []
    for token, items in media_of.items():
        places, used = torch.nonzero(tokens_L == token).flatten().tolist(), 0
        for item in items:
            placed.append((places[used] if used < len(places) else len(tokens_L), item))
            used += item.rows
    return tuple(item for _, item in sorted(placed, key=lambda pair: pair[0]))
