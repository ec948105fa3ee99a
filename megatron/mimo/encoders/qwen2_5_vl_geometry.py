"""Where the patches of Qwen2.5-VL's images and clips stand, computed on the host from their sizes.

An item is a grid of patches: frames, lines, columns. Patches come in squares of merge x merge, each
of which becomes one row of the encoder's output; squares are grouped into windows. The encoder
works on all patches of all items in one sequence, in which a window's patches follow each other.

Legend: T patches of all items, R squares (output rows) of all items, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.partition.packing import PackedRow
from megatron.mimo.encoders.patch_grids import Grid, SquareGeometry, TurnedSequence, borders, moved

__all__ = ["PatchGeometry", "PatchSequence", "patch_sequence"]


@dataclass(frozen=True, kw_only=True)
class PatchGeometry(SquareGeometry):
    """What is the same for all items of a model.

    Attributes:
        window: squares along each side of a window.

    Raises:
        ConfigError: sizes that cannot be.
    """

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(
                f"windows of {self.window} x {self.window} squares; expected at least 1"
            )

    def window_pairs(self, grid: Grid) -> int:
        """Pairs of patches that lie in one window."""
        frames, *sides = grid
        squares = [
            sum(piece**2 for piece in _cut(side // self.merge, self.window)) for side in sides
        ]
        return frames * squares[0] * squares[1] * self.merge**4


@dataclass(kw_only=True)
class PatchSequence(TurnedSequence):
    """A sequence in which the patches of a window follow each other.

    Attributes:
        windows: where windows begin and end.
        order_T: int64; patch ``order_T[i]`` of the items stands at place i.
        places_R: int64; row r of the items is made of square ``places_R[r]`` of the sequence.
    """

    windows: PackedRow
    order_T: Tensor
    places_R: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Item:
    """One item's part of a sequence; numbers count from its own begin.

    Attributes:
        squares_R: its squares, in the order of the sequence.
        turns_TD: [T, D] rotation of each patch, in the order of the sequence.
        windows: patches of each window.
    """

    squares_R: Tensor
    turns_TD: Tensor
    windows: tuple[int, ...]


@lru_cache(maxsize=4)
def patch_sequence(
    grids: tuple[Grid, ...],
    geometry: PatchGeometry,
    device: torch.device,
    *,
    borders_on_host: bool,
) -> PatchSequence:
    """The sequence of items of these grids.

    Nothing waits for the device: tensors are made on the host and copied.

    Args:
        grids: one of each item, at least one.
        geometry: of the model.
        device: where its tensors go.
        borders_on_host: leave the borders of frames and windows on the host.

    Raises:
        InputError: see :meth:`PatchGeometry.rows`.
    """
    # Without inference mode, even if the first to ask is in it: the next may be training.
    with torch.inference_mode(mode=False), torch.device("cpu"):
        starts = [0, *accumulate(geometry.rows(grid) for grid in grids)]
        items = [_item(grid, geometry) for grid in grids]
        parts = [item.squares_R + start for item, start in zip(items, starts, strict=False)]
        squares_R = torch.cat(parts)
        patches = geometry.merge**2
        order_T = (squares_R[:, None] * patches + torch.arange(patches)).flatten()
        turns_TD = torch.cat([item.turns_TD for item in items])
        frames = [lines * columns for count, lines, columns in grids for _ in range(count)]
        windows = [length for item in items for length in item.windows]

        where = None if borders_on_host else device
        return PatchSequence(
            qkv_format="thd",
            **borders(frames, where),
            windows=PackedRow(qkv_format="thd", **borders(windows, where)),
            turns_TD=moved(turns_TD, device),
            order_T=moved(order_T, device),
            places_R=moved(squares_R.argsort(), device),
        )


@lru_cache(maxsize=256)
def _item(grid: Grid, geometry: PatchGeometry) -> _Item:
    frames, lines, columns = (grid[0], grid[1] // geometry.merge, grid[2] // geometry.merge)
    frame_R, line_R, column_R = (
        axis.flatten()
        for axis in torch.meshgrid(
            torch.arange(frames), torch.arange(lines), torch.arange(columns), indexing="ij"
        )
    )
    down, across = (_cut(size, geometry.window) for size in (lines, columns))
    row_R = frame_R * len(down) + line_R // geometry.window  # of windows, over all frames
    squares_R = (row_R * len(across) + column_R // geometry.window).argsort(stable=True)
    windows = [high * wide * geometry.merge**2 for high in down for wide in across]

    within = torch.arange(geometry.merge)
    places = []
    for axis_R, by_line in ((line_R, True), (column_R, False)):
        first_R = axis_R[squares_R] * geometry.merge
        offsets = within[:, None] if by_line else within[None, :]
        shape = (len(first_R), geometry.merge, geometry.merge)
        places.append((first_R[:, None, None] + offsets).expand(shape).flatten())
    return _Item(
        squares_R=squares_R,
        turns_TD=geometry.turns(*places),
        windows=tuple(windows * frames),
    )


def _cut(length: int, piece: int) -> list[int]:
    """Pieces of a length; the last may be shorter."""
    return [min(piece, length - start) for start in range(0, length, piece)]
