"""One conversation of Qwen2.5-VL, from Hugging Face's form to a sample.

Images and clips go through one encoder, in the order of their placeholders, as one modality: the
placeholders of clips become those of images once positions are computed.

Legend: L tokens of the sample, T patches, E values of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import MediaItem, Sample
from megatron.mimo.data.positions import grid_positions
from megatron.mimo.encoders.qwen2_5_vl_geometry import Grid, PatchGeometry
from megatron.mimo.models.common.tokens import read_tokens
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
_IMAGE, _VIDEO = 1, 2  # as in mm_token_type_ids, where 0 is text


@dataclass(frozen=True, kw_only=True, eq=False)
class _Visual:
    """One image or clip of a conversation.

    Attributes:
        pixels_TE: its patches.
        grid: of patches.
        squares: frames, lines and columns of rows.
        rows: that it yields.
        time_step: positions from one frame to the next.
    """

    pixels_TE: Tensor
    grid: Grid
    squares: Grid
    rows: int
    time_step: float


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
    types_L = _IMAGE * (tokens_L == config.image_token_id).long()
    types_L += _VIDEO * (tokens_L == config.video_token_id).long()
    _check_types(given.get("mm_token_type_ids"), types_L, name)
    try:
        visuals = _in_order(types_L, given, config.vision_config)
        positions_3L = grid_positions(
            types_L > 0,
            [one.squares for one in visuals],
            time_step=[one.time_step for one in visuals],
            count_frames=False,  # as transformers 5 does it
        )
    except InputError as error:
        raise InputError(f"sample {name}: {error}") from error
    return Sample(
        name=name,
        token_ids=tokens_L.masked_fill(types_L == _VIDEO, config.image_token_id),
        is_label=types_L == 0 if is_label is None else is_label,
        media=tuple(_item(one) for one in visuals),
        position_ids=positions_3L,
    )


def _item(visual: _Visual) -> MediaItem:
    return MediaItem(
        modality="images",
        encoder=ENCODER,
        inputs={
            "pixel_values": visual.pixels_TE.float(),
            "grid": torch.tensor(visual.grid),
        },
        rows=visual.rows,
    )


def _check_types(given_1L: Tensor | None, types_L: Tensor, name: str) -> None:
    if given_1L is not None and not torch.equal(given_1L.flatten().long(), types_L):
        raise InputError(
            f"sample {name}: mm_token_type_ids are not those of input_ids; expected 1 at tokens "
            "that are image_token_id, 2 at video_token_id, 0 elsewhere"
        )


def _in_order(types_L: Tensor, given: Mapping[str, Tensor], vision: Any) -> list[_Visual]:
    """Images and clips in the order of their placeholders."""
    geometry = patch_geometry(vision)
    clips = len(given.get("video_grid_thw", ()))
    seconds = torch.as_tensor(given.get("second_per_grid_ts", torch.ones(clips)))
    if len(seconds) != clips:
        raise InputError(
            f"second_per_grid_ts has {len(seconds)} entries for {clips} videos; expected as many"
        )
    # In fp32, as transformers multiplies them.
    steps = (vision.tokens_per_second * seconds.float()).tolist()
    images = len(given.get("image_grid_thw", ()))
    waiting = {
        _IMAGE: _visuals(given, "pixel_values", "image_grid_thw", [1.0] * images, geometry),
        _VIDEO: _visuals(given, "pixel_values_videos", "video_grid_thw", steps, geometry),
    }
    names = {_IMAGE: "image", _VIDEO: "video"}
    placeholders = types_L[types_L > 0].tolist()
    visuals: list[_Visual] = []
    at = 0
    while at < len(placeholders):
        kind = placeholders[at]
        one = next(waiting[kind], None)
        if one is None:
            raise InputError(
                f"{placeholders[at:].count(kind)} {names[kind]} tokens are left and no "
                f"{names[kind]} for them; expected one row of {names[kind]}_grid_thw for each "
                f"{names[kind]}"
            )
        found = placeholders[at : at + one.rows].count(kind)
        if found != one.rows:
            raise InputError(
                f"the {names[kind]} of grid {one.grid} needs {one.rows} {names[kind]} tokens in "
                f"a row and finds {found}"
            )
        visuals.append(one)
        at += one.rows
    for kind, rest in waiting.items():
        left = len(list(rest))
        if left:
            raise InputError(
                f"the last {left} of its {names[kind]}s have no {names[kind]} tokens; expected "
                f"one token for each {geometry.merge**2} patches"
            )
    return visuals


def _visuals(
    given: Mapping[str, Tensor],
    pixels: str,
    grids: str,
    steps: list[float],
    geometry: PatchGeometry,
) -> Iterator[_Visual]:
    """Images, or clips, from their joined patches ``given[pixels]`` and ``given[grids]``."""
    if (pixels in given) != (grids in given):
        raise InputError(f"one of {pixels} and {grids} is missing; expected both or none")
    if pixels not in given:
        return
    at, patches_TE = 0, given[pixels]
    counts = [int(count) for count in given[grids].prod(dim=1)]
    if len(patches_TE) != sum(counts):
        raise InputError(
            f"{pixels} has {len(patches_TE)} patches for {grids} {given[grids].tolist()}; expected "
            f"{sum(counts)}"
        )
    for sizes, count, step in zip(given[grids].tolist(), counts, steps, strict=True):
        frames, lines, columns = sizes
        grid = (frames, lines, columns)
        rows = geometry.rows(grid)
        yield _Visual(
            pixels_TE=patches_TE[at : at + count],
            grid=grid,
            squares=(frames, lines // geometry.merge, columns // geometry.merge),
            rows=rows,
            time_step=step,
        )
        at += count
