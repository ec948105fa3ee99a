"""Positions in three axes (time, height, width) for multimodal RoPE. L tokens of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError

__all__ = ["grid_positions"]


def grid_positions(
    is_media_L: Tensor, grids: Sequence[tuple[int, int, int]], *, time_step: int = 1
) -> Tensor:
    """Positions of text with images or clips in it, as Qwen2-VL numbers them.

    A text token has the same position on all axes, one more than the largest before it. The rows
    of an item, frame by frame and line by line, count frame, line and column on from there; what
    follows the item goes on behind its largest position on any axis.

    Args:
        is_media_L: bool [L], True at the items' placeholders, each item's in one run.
        grids: frames, lines and columns of each item, in order.
        time_step: positions from one frame to the next.

    Returns:
        int64 [3, L].

    Raises:
        InputError: placeholders and grids that do not fit each other.
    """
    length, rows = len(is_media_L), [frames * lines * columns for frames, lines, columns in grids]
    if int(is_media_L.sum()) != sum(rows):
        raise InputError(
            f"{int(is_media_L.sum())} placeholders for grids {list(grids)}, which have "
            f"{sum(rows)} rows; expected one placeholder per row"
        )
    positions_3L = torch.empty(3, length, dtype=torch.int64)
    at, following, items = 0, 0, iter(grids)
    flags = is_media_L.tolist()
    while at < length:
        if not flags[at]:
            positions_3L[:, at] = following
            at, following = at + 1, following + 1
            continue
        grid = next(items)
        axes = [torch.arange(size) for size in grid]
        axes[0] = axes[0] * time_step
        item_3N = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + following
        stop = at + item_3N.size(1)
        if not all(flags[at:stop]):
            raise InputError(
                f"the item of grid {grid} begins at token {at} and is interrupted; its "
                f"{item_3N.size(1)} placeholders have to follow each other"
            )
        positions_3L[:, at:stop] = item_3N
        at, following = stop, int(item_3N.max()) + 1
    return positions_3L
