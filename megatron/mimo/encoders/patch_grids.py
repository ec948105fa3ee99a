"""Images and clips as grids of patches, in squares: what the Qwen-VL encoders have in common.

An item is a grid of patches: frames, lines, columns. Patches come in squares of merge x merge, each
of which becomes one row of the encoder's output. All patches of all items are one sequence, in
which queries and keys turn by line and column. Everything here is computed on the host.

Legend: T patches of all items, H heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.partition.packing import PackedRow

__all__ = [
    "Grid",
    "SquareGeometry",
    "TurnedSequence",
    "borders",
    "check_items",
    "moved",
]

Grid = tuple[int, int, int]
"""Frames, lines and columns of an item, in patches."""


@dataclass(frozen=True, kw_only=True)
class SquareGeometry:
    """What is the same for all items of a model.

    Attributes:
        merge: patches along each side of a square.
        head_size: D, a multiple of 4.
        theta: base of the rotation's wavelengths.

    Raises:
        ConfigError: sizes that cannot be.
    """

    merge: int
    head_size: int
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.merge < 1:
            raise ConfigError(
                f"squares of {self.merge} x {self.merge} patches; expected at least 1"
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

    def turns(self, line_T: Tensor, column_T: Tensor) -> Tensor:
        """Cosines, then sines of patches by their line and column: [T, D] fp32."""
        half = self.head_size // 2
        frequencies = 1 / self.theta ** (torch.arange(0, half, 2).float() / half)
        axes = [axis_T[:, None].float() * frequencies for axis_T in (line_T, column_T)]
        angles_TD = torch.cat(axes, dim=1)
        return torch.cat([angles_TD.cos(), angles_TD.sin()], dim=1)


@dataclass(kw_only=True)
class TurnedSequence(PackedRow):
    """All patches of a call as one packed sequence: what every layer needs to know of it.

    As ``PackedRow`` it says where frames begin and end.

    Attributes:
        turns_TD: [T, D] fp32: cosines, then sines of how far the two halves of a head of queries
            and keys turn, by line and column.
    """

    turns_TD: Tensor


def borders(lengths: Sequence[int], device: torch.device | None) -> dict[str, Any]:
    """Where pieces of a sequence begin and end, as arguments of ``PackedRow``.

    Args:
        lengths: of the pieces, at least one.
        device: where the borders go; None leaves them on the host.
    """
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if device is not None:
        sums = moved(sums, device)
    longest = max(lengths)
    return {
        "cu_seqlens_q": sums,
        "cu_seqlens_kv": sums,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "bounds_q": sums,
        "bounds_kv": sums,
        "pad_between_seqs": False,
    }


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without a wait for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def check_items(
    pixel_values: Sequence[Tensor],
    grids: Sequence[Grid],
    geometry: SquareGeometry,
    patch_values: int,
) -> None:
    """Raise ``InputError`` unless every item has the patches of its grid, [patches, values]."""
    if len(pixel_values) != len(grids):
        raise InputError(
            f"pixel_values of {len(pixel_values)} items and {len(grids)} grids; expected as many"
        )
    for number, (patches_TE, one) in enumerate(zip(pixel_values, grids, strict=True)):
        expected = [geometry.rows(one) * geometry.merge**2, patch_values]
        if list(patches_TE.shape) != expected or not patches_TE.is_floating_point():
            raise InputError(
                f"pixel_values of item {number}, whose grid is {one}, are {patches_TE.dtype} "
                f"{list(patches_TE.shape)}; expected floating point {expected}"
            )
