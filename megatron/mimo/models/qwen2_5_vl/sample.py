"""One conversation of Qwen2.5-VL, from Hugging Face's form to a sample.

The placeholders of clips become those of images once positions are computed.

Legend: L tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import Sample
from megatron.mimo.data.positions import grid_positions
from megatron.mimo.models.common.tokens import read_tokens
from megatron.mimo.models.common.visuals import VIDEO, token_types, visual_item, visuals_in_order
from megatron.mimo.models.qwen2_5_vl.vision import ENCODER, patch_geometry

__all__ = ["sample"]

_FEATURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
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

    ``second_per_grid_ts`` says how many seconds a frame of each video stands for; 1 by default.
    ``mm_token_type_ids`` have to be those of ``input_ids``.
    """
    tokens_L, given = read_tokens(features, *_FEATURES, name=name)
    types_L = token_types(config, tokens_L, given.get("mm_token_type_ids"), name)
    try:
        steps = _time_steps(given, config.vision_config)
        visuals = visuals_in_order(types_L, given, patch_geometry(config.vision_config))
        positions_3L = grid_positions(
            types_L > 0,
            [one.squares for one in visuals],
            time_step=[steps[one.number] if one.kind == VIDEO else 1.0 for one in visuals],
            count_frames=False,  # as transformers 5 does it
        )
    except InputError as error:
        raise InputError(f"sample {name}: {error}") from error
    return Sample(
        name=name,
        token_ids=tokens_L.masked_fill(types_L == VIDEO, config.image_token_id),
        is_label=types_L == 0 if is_label is None else is_label,
        media=tuple(visual_item(one, ENCODER) for one in visuals),
        position_ids=positions_3L,
    )


def _time_steps(given: Mapping[str, Tensor], vision: Any) -> list[float]:
    """Positions from one frame of each clip to the next."""
    clips = len(given.get("video_grid_thw", ()))
    seconds = torch.as_tensor(given.get("second_per_grid_ts", torch.ones(clips)))
    if len(seconds) != clips:
        raise InputError(
            f"second_per_grid_ts has {len(seconds)} entries for {clips} videos; expected as many"
        )
    # In fp32, as transformers multiplies them.
    steps: list[float] = (vision.tokens_per_second * seconds.float()).tolist()
    return steps
