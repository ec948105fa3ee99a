"""Where the patches of Qwen3-VL's images and clips stand, computed on the host from their sizes.

Positions are learned on a square grid, whose corners are the item's corners: that of a patch is
interpolated from the four points around it. All frames of a clip have the same positions.

Legend: T patches of all items, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.encoders.patch_grids import Grid, SquareGeometry, TurnedSequence, borders, moved

__all__ = ["FrameGeometry", "FrameSequence", "frame_sequence"]


@dataclass(frozen=True, kw_only=True)
class FrameGeometry(SquareGeometry):
    """What is the same for all items of a model.

    Attributes:
        side: points along each side of the grid of learned positions.

    Raises:
        ConfigError: sizes that cannot be.
    """

    side: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < 1:
            raise ConfigError(f"a grid of {self.side} x {self.side} positions; expected at least 1")


@dataclass(kw_only=True)
class FrameSequence(TurnedSequence):
    """A sequence with interpolated learned positions.

    Attributes:
        taps_T4: int64 [T, 4], the four points of the square grid around a patch.
        weights_T4: fp32 [T, 4], the weight of each.
    """

    taps_T4: Tensor
    weights_T4: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Item:
    """One item's part of a sequence; as the fields of the sequence."""

    turns_TD: Tensor
    taps_T4: Tensor
    weights_T4: Tensor


@lru_cache(maxsize=4)
def frame_sequence(
    grids: tuple[Grid, ...],
    geometry: FrameGeometry,
    device: torch.device,
    *,
    borders_on_host: bool,
) -> FrameSequence:
    """The sequence of items of these grids.

    Nothing waits for the device: tensors are made on the host and copied.

    Args:
        grids: one of each item, at least one.
        geometry: of the model.
        device: where its tensors go.
        borders_on_host: leave the borders of frames on the host.

    Raises:
        InputError: see :meth:`SquareGeometry.rows`.
    """
    # Without inference mode, even if the first to ask is in it: the next may be training.
    with torch.inference_mode(mode=False), torch.device("cpu"):
        for grid in grids:
            geometry.rows(grid)
        items = [_item(grid, geometry) for grid in grids]
        turns_TD = torch.cat([item.turns_TD for item in items])
        frames = [lines * columns for count, lines, columns in grids for _ in range(count)]
        return FrameSequence(
            qkv_format="thd",
            **borders(frames, None if borders_on_host else device),
            turns_TD=moved(turns_TD, device),
            taps_T4=moved(torch.cat([item.taps_T4 for item in items]), device),
            weights_T4=moved(torch.cat([item.weights_T4 for item in items]), device),
        )


@lru_cache(maxsize=256)
def _item(grid: Grid, geometry: FrameGeometry) -> _Item:
    count, lines, columns = grid
    line_T, column_T = _places(lines, columns, geometry.merge)
    (above_T2, vertical_T2), (left_T2, horizontal_T2) = (
        _between(axis_T, size, geometry.side)
        for axis_T, size in ((line_T, lines), (column_T, columns))
    )
    taps_T4 = (above_T2[:, :, None] * geometry.side + left_T2[:, None, :]).flatten(1)
    weights_T4 = (vertical_T2[:, :, None] * horizontal_T2[:, None, :]).flatten(1)
    turns_TD = geometry.turns(line_T, column_T)
    return _Item(
        turns_TD=turns_TD.repeat(count, 1),
        taps_T4=taps_T4.repeat(count, 1),
        weights_T4=weights_T4.repeat(count, 1),
    )


def _places(lines: int, columns: int, merge: int) -> tuple[Tensor, Tensor]:
    """Line and column of each patch of a frame, square by square."""
    axes = torch.meshgrid(torch.arange(lines), torch.arange(columns), indexing="ij")
    squares = (lines // merge, merge, columns // merge, merge)
    line_T, column_T = (axis.reshape(squares).transpose(1, 2).flatten() for axis in axes)
    return line_T, column_T


def _between(place_T: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """The two points of an axis that places stand between, and the weight of each: [T, 2].

    Args:
        place_T: places on an axis of ``size`` patches.
        size: of the item.
        side: points of the learned axis, the first and last of which are the item's ends.
    """
    # In fp32 and in this order, as transformers computes it: rounding down must come out the same.
    point_T = place_T.float() * (side - 1) / max(size - 1, 1)
    below_T = point_T.floor()
    steps = torch.arange(2)
    points_T2 = (below_T.long()[:, None] + steps).clamp(max=side - 1)
    weights_T2 = 1 - (point_T[:, None] - below_T[:, None] - steps).abs()
    return points_T2, weights_T2.clamp(min=0)
