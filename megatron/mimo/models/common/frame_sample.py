"""One conversation of Qwen3-VL or Qwen3.5, from Hugging Face's form to a sample; random ones.

The frames of a clip stand apart, each behind the text that says its second, and each has the
positions of an image. The placeholders of clips become those of images once positions are computed.

Legend: L tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import Sample
from megatron.mimo.data.positions import grid_positions
from megatron.mimo.encoders.patch_grids import Grid
from megatron.mimo.models.common.frame_tower import ENCODER, frame_geometry
from megatron.mimo.models.common.tiny import random_text
from megatron.mimo.models.common.tokens import read_tokens
from megatron.mimo.models.common.visuals import (
    IMAGE,
    VIDEO,
    Visual,
    random_features,
    token_types,
    visual_item,
    visuals_in_order,
)

__all__ = ["TINY_TOKENS", "example", "sample"]

TINY_TOKENS: dict[str, Any] = {
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "image_token_id": 5,
    "video_token_id": 6,
}
"""Of a tiny configuration."""

_FEATURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_token_type_ids",
)


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids``, ``pixel_values`` with ``image_grid_thw``, and the same of videos.

    ``mm_token_type_ids`` have to be those of ``input_ids``.
    """
    tokens_L, given = read_tokens(features, *_FEATURES, name=name)
    types_L = token_types(config, tokens_L, given.get("mm_token_type_ids"), name)
    try:
        visuals = visuals_in_order(types_L, given, frame_geometry(config.vision_config))
        positions_3L = grid_positions(types_L > 0, _frames(visuals))
    except InputError as error:
        raise InputError(f"sample {name}: {error}") from error
    return Sample(
        name=name,
        token_ids=tokens_L.masked_fill(types_L == VIDEO, config.image_token_id),
        is_label=types_L == 0 if is_label is None else is_label,
        media=tuple(visual_item(one, ENCODER) for one in visuals),
        position_ids=positions_3L,
    )


def _frames(visuals: Sequence[Visual]) -> list[Grid]:
    """Images, and the frames of clips one by one, in squares."""
    return [(1, *one.squares[1:]) for one in visuals for _ in range(one.squares[0])]


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images and clips with text before, between and behind them."""
    special = [
        *(config.image_token_id, config.video_token_id),
        *(config.vision_start_token_id, config.vision_end_token_id),
    ]
    around = torch.tensor(special[2:]).split(1)
    merge = config.vision_config.spatial_merge_size

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    tokens = [random_text(config, special, generator)]
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for _ in range(number(1, 4)):
        kind = VIDEO if number(0, 2) == 1 else IMAGE
        frames, most = (number(2, 4), 4) if kind == VIDEO else (1, 6)
        down, across = number(1, most), number(1, most)
        grids[kind].append([frames, down * merge, across * merge])
        for _ in range(frames):  # of a clip, each behind text that says when it is
            placeholders = torch.full((down * across,), special[kind - 1])
            text = random_text(config, special, generator)
            tokens += [text, around[0], placeholders, around[1]]
    tokens.append(random_text(config, special, generator))
    return random_features(config, torch.cat(tokens), tuple(grids.values()), generator)
