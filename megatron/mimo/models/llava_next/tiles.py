"""The tiles into which LLaVA-NeXT cuts an image, and where the rows of the image come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.mimo.encoders import NEWLINE
from megatron.mimo.models.common.vision_tower import rows_per_image

__all__ = [
    "Size",
    "best_resolution",
    "check_resolutions",
    "row_sources",
    "side_in_patches",
    "tiles_of",
]

Size = tuple[int, int]  # height, width


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The resolution that keeps most of an image's pixels; of equally good ones the smallest.

    Args:
        size: of the image.
        resolutions: height and width of each; the first of equally good ones is taken.
    """
    height, width = size

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -resolution[0] * resolution[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def tiles_of(config: Any, size: Size) -> Size:
    """Rows and columns of the tiles of an image, the one of the whole image left out."""
    side: int = config.vision_config.image_size
    height, width = best_resolution(size, config.image_grid_pinpoints)
    return height // side, width // side


def row_sources(config: Any, size: Size) -> Tensor:
    """int64 [rows]: where each row of an image comes from, see ``AnyResolutionSubmodules``.

    First come all rows of the first tile, then the rows of the others line by line, without
    those of padding around the image; a newline ends each line.

    Args:
        config: of the model.
        size: of the image before it was cut.
    """
    side = side_in_patches(config)
    tile_rows, tile_columns = tiles_of(config, size)
    first, last, left, right = _without_padding(size, (tile_rows * side, tile_columns * side))
    y, x = torch.arange(first, last)[:, None], torch.arange(left, right)[None]
    tile = 1 + y // side * tile_columns + x // side
    lines = tile * side**2 + y % side * side + x % side
    newlines = torch.full((last - first, 1), NEWLINE)
    return torch.cat([torch.arange(side**2), torch.cat([lines, newlines], dim=1).flatten()])


def _without_padding(size: Size, grid: Size) -> tuple[int, int, int, int]:
    """First and last line, first and last column of a grid that an image, centred in it, fills."""
    (height, width), (grid_height, grid_width) = size, grid
    if width / height > grid_width / grid_height:
        filled = int(round(height * (grid_width / width), 7))
        border = (grid_height - filled) // 2
        return border, grid_height - border, 0, grid_width
    filled = int(round(width * (grid_height / height), 7))
    border = (grid_width - filled) // 2
    return 0, grid_height, border, grid_width - border


def side_in_patches(config: Any) -> int:
    """Patches along the side of a tile, all of which give a row."""
    vision = config.vision_config
    side: int = vision.image_size // vision.patch_size
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    if rows != side**2:
        raise UnsupportedError(
            f"a tile of {side} x {side} patches gives {rows} rows; expected one per patch: "
            "vision_feature_select_strategy 'default' with CLIP, 'full' with SigLIP"
        )
    return side


def check_resolutions(config: Any) -> None:
    """Refuse resolutions that are no whole tiles, which transformers cuts and cannot use."""
    side = config.vision_config.image_size
    for resolution in config.image_grid_pinpoints:
        if len(resolution) != 2 or any(length < 1 or length % side for length in resolution):
            raise UnsupportedError(
                f"config.json: image_grid_pinpoints has {list(resolution)}; expected height and "
                f"width that are multiples of vision_config.image_size, {side}"
            )
