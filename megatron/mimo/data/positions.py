"""Positions in three axes (time, height, width) for multimodal RoPE. L tokens of one sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError

__all__ = ["grid_positions"]


def grid_positions(
    is_media_L: Tensor,
    grids: Sequence[tuple[int, int, int]],
    *,
    time_step: float | Sequence[float] = 1,
    count_frames: bool = True,
) -> Tensor:
    """Positions of text with images or clips in it, as Qwen2-VL numbers them.

    A text token has the same position on all axes, one more than the largest before it. The rows
    of an item, frame by frame and line by line, have the numbers of their frame, line and column,
    counted from there; what follows the item continues behind its largest position on any axis.

    Args:
        is_media_L: bool [L], True at the items' placeholders, each item's in one run.
        grids: frames, lines and columns of each item, in order.
        time_step: positions from one frame to the next, of all items or of each; the position of
            a frame is rounded down.
        count_frames: False makes what follows an item go on behind its largest line or column,
            wherever its last frame is.

    Returns:
        int64 [3, L].

    Raises:
        InputError: placeholders and grids that do not fit each other.
    """
    rows = [frames * lines * columns for frames, lines, columns in grids]
    runs = _runs(is_media_L)
    if int(is_media_L.sum()) != sum(rows):
        raise InputError(
            f"{int(is_media_L.sum())} placeholders for grids {list(grids)}, which have "
            f"{sum(rows)} rows; expected one placeholder per row"
        )
    steps = list(time_step) if isinstance(time_step, Sequence) else [time_step] * len(rows)
    if len(steps) != len(rows):
        raise InputError(f"{len(steps)} time steps for {len(rows)} grids; expected one for each")
    parts: list[Tensor] = []
    following, items = 0, iter(zip(grids, rows, steps, strict=True))
    for start, stop, is_media in runs:
        if not is_media:
            parts.append((torch.arange(stop - start) + following).expand(3, -1))
            following += stop - start
        while is_media and start < stop:
            grid, length, step = next(items)
            if start + length > stop:
                raise InputError(
                    f"the item of grid {grid} begins at token {start} and is interrupted; its "
                    f"{length} placeholders have to follow each other"
                )
            item_3N = _item_positions(grid, step)
            parts.append(item_3N + following)
            extent = max(grid[1:]) if not count_frames else int(item_3N.max()) + 1
            start, following = start + length, following + extent
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.int64)


def _item_positions(grid: tuple[int, int, int], step: float) -> Tensor:
    """Frame, line and column of each row: int64 [3, rows]."""
    frames, lines, columns = (torch.arange(size) for size in grid)
    # In fp32 as transformers computes it: rounding down must come out the same.
    frames = (frames * torch.tensor(step, dtype=torch.float32)).long()
    return torch.stack(torch.meshgrid(frames, lines, columns, indexing="ij")).flatten(1)


def _runs(flags_L: Tensor) -> list[tuple[int, int, bool]]:
    """Start, stop and value of each run of equal flags."""
    flags = flags_L.to(torch.int8)
    changes = (torch.nonzero(flags.diff()).flatten() + 1).tolist()
    borders = [0, *changes, len(flags)] if len(flags) else [0]
    return [(start, stop, bool(flags[start])) for start, stop in itertools.pairwise(borders)]
