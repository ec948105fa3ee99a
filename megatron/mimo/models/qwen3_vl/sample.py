"""One conversation of Qwen3-VL, from Hugging Face's form to a sample.

The frames of a clip stand apart, each behind the text that says its second, and each has the
positions of an image. The placeholders of clips become those of images once positions are computed.

Legend: L tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import Sample
from megatron.mimo.data.positions import grid_positions
from megatron.mimo.encoders.patch_grids import Grid
from megatron.mimo.models.common.tokens import read_tokens
from megatron.mimo.models.common.visuals import (
    VIDEO,
    Visual,
    token_types,
    visual_item,
    visuals_in_order,
)
from megatron.mimo.models.qwen3_vl.vision import ENCODER, frame_geometry

__all__ = ["sample"]

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
