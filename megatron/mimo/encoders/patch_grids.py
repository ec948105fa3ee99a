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

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.packed_seq_params import PackedSeqParams

__all__ = ["Grid", "SquareGeometry", "TurnedSequence", "borders", "check_items", "moved", "rotated"]

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

    def angles(self, line_T: Tensor, column_T: Tensor) -> Tensor:
        """Rotation of patches by their line and column: [T, D / 2] fp32."""
        half = self.head_size // 2
        frequencies = 1 / self.theta ** (torch.arange(0, half, 2).float() / half)
        axes = [axis_T[:, None].float() * frequencies for axis_T in (line_T, column_T)]
        return torch.cat(axes, dim=1)


@dataclass(kw_only=True)
class TurnedSequence(PackedSeqParams):
    """All patches of a call as one packed sequence: what every layer needs to know of it.

    As ``PackedSeqParams`` it says where frames begin and end.

    Attributes:
        cos_TD: [T, D / 2] fp32, to rotate queries and keys by their line and column.
        sin_TD: likewise.
    """

    cos_TD: Tensor
    sin_TD: Tensor


def borders(lengths: Sequence[int], device: torch.device | None) -> dict[str, Tensor | int]:
    """Where pieces of a sequence begin and end, as arguments of ``PackedSeqParams``.

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
    }


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without a wait for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def rotated(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn feature i and feature i + D / 2 of each head by an angle, in fp32.

    Args:
        heads_THD: queries or keys.
        cos_TD: [T, D / 2] fp32.
        sin_TD: likewise.
    """
    first, second = heads_THD.float().chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads_THD.dtype)


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
