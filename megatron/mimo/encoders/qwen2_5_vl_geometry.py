"""Where the patches of Qwen2.5-VL's images and clips stand, computed on the host from their sizes.

An item is a grid of patches: frames, lines, columns. Patches come in squares of merge x merge, each
of which becomes one row of the encoder's output; squares are grouped into windows. The encoder
works on all patches of all items in one sequence, in which a window's patches follow each other.

Legend: T patches of all items, R squares (output rows) of all items, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.packed_seq_params import PackedSeqParams

__all__ = ["Grid", "PatchGeometry", "PatchSequence", "patch_sequence"]

Grid = tuple[int, int, int]
"""Frames, lines and columns of an item, in patches."""


@dataclass(frozen=True, kw_only=True)
class PatchGeometry:
    """What is the same for all items of a model.

    Attributes:
        merge: patches along each side of a square.
        window: squares along each side of a window.
        head_size: D, a multiple of 4.
        theta: base of the rotation's wavelengths.

    Raises:
        ConfigError: sizes that cannot be.
    """

    merge: int
    window: int
    head_size: int
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.merge < 1 or self.window < 1:
            raise ConfigError(
                f"squares of {self.merge} x {self.merge} patches in windows of {self.window} x "
                f"{self.window} squares; expected at least 1"
            )
        if self.head_size < 4 or self.head_size % 4:
            raise ConfigError(
                f"the head size is {self.head_size}; a rotation by line and column takes a "
                "multiple of 4"
            )

    def rows(self, grid: Sequence[int]) -> int:
        """Squares of an item of frames, lines and columns of patches.

        Raises:
            InputError: the grid is not three positive numbers, or is not divisible into squares.
        """
        fits = len(grid) == 3 and all(type(size) is int and size > 0 for size in grid)
        if not fits or grid[1] % self.merge or grid[2] % self.merge:
            raise InputError(
                f"a grid is {grid!r}; expected (frames, lines, columns) as positive integers on "
                f"the host, lines and columns divisible by {self.merge}"
            )
        return grid[0] * grid[1] * grid[2] // self.merge**2


@dataclass(kw_only=True)
class PatchSequence(PackedSeqParams):
    """All patches of a call as one packed sequence: what every layer needs to know of it.

    As ``PackedSeqParams`` it says where frames begin and end.

    Attributes:
        windows: where windows begin and end.
        cos_TD: [T, D / 2] fp32, to rotate queries and keys by their line and column.
        sin_TD: likewise.
        order_T: int64; patch ``order_T[i]`` of the items stands at place i.
        places_R: int64; row r of the items is made of square ``places_R[r]`` of the sequence.
    """

    windows: PackedSeqParams
    cos_TD: Tensor
    sin_TD: Tensor
    order_T: Tensor
    places_R: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Item:
    """One item's part of a sequence; numbers count from its own begin.

    Attributes:
        squares_R: its squares, in the order of the sequence.
        angles_TD: [T, D / 2] rotation of each patch, in the order of the sequence.
        windows: patches of each window.
    """

    squares_R: Tensor
    angles_TD: Tensor
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
        angles_TD = torch.cat([item.angles_TD for item in items])
        frames = [lines * columns for count, lines, columns in grids for _ in range(count)]
        windows = [length for item in items for length in item.windows]

        def borders(lengths: Sequence[int]) -> dict[str, Tensor | int]:
            sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            if not borders_on_host:
                sums = _copied(sums, device)
            longest = max(lengths)
            return {
                "cu_seqlens_q": sums,
                "cu_seqlens_kv": sums,
                "max_seqlen_q": longest,
                "max_seqlen_kv": longest,
            }

        return PatchSequence(
            qkv_format="thd",
            **borders(frames),
            windows=PackedSeqParams(qkv_format="thd", **borders(windows)),
            cos_TD=_copied(angles_TD.cos(), device),
            sin_TD=_copied(angles_TD.sin(), device),
            order_T=_copied(order_T, device),
            places_R=_copied(squares_R.argsort(), device),
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
    rates = torch.arange(0, geometry.head_size // 2, 2).float() / (geometry.head_size // 2)
    frequencies = 1 / geometry.theta**rates
    angles = []
    for axis_R, by_line in ((line_R, True), (column_R, False)):
        first_R = axis_R[squares_R] * geometry.merge
        offsets = within[:, None] if by_line else within[None, :]
        shape = (len(first_R), geometry.merge, geometry.merge)
        positions_T = (first_R[:, None, None] + offsets).expand(shape).flatten()
        angles.append(positions_T[:, None].float() * frequencies)
    return _Item(
        squares_R=squares_R,
        angles_TD=torch.cat(angles, dim=1),
        windows=tuple(windows * frames),
    )


def _cut(length: int, piece: int) -> list[int]:
    """Pieces of a length; the last may be shorter."""
    return [min(piece, length - start) for start in range(0, length, piece)]


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
