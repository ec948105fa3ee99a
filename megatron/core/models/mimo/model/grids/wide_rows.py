"""Rows and their levels as one tensor, to travel between ranks.

Legend: N rows of one modality, H hidden.
"""

from __future__ import annotations

import torch

from megatron.core.models.mimo.alignment import Encoded, EncodedRows


def join_levels(encoded: Encoded | None, levels: int, empty_H: torch.Tensor) -> torch.Tensor:
    """Rows and their levels as one tensor [N, (1 + levels) * H]; [0, ...] for None.

    Args:
        encoded: projected rows; without levels where a modality is idle.
        levels: how many levels every row has.
        empty_H: a vector like one row.
    """
    if encoded is None:
        return empty_H.new_empty(0, (1 + levels) * empty_H.numel())
    tensors = EncodedRows.of(encoded).tensors
    if len(tensors) == 1:
        tensors = tensors * (1 + levels) if not tensors[0].size(0) else tensors
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]


def split_levels(wide_NH: torch.Tensor, levels: int) -> Encoded:
    """The inverse of ``join_levels``."""
    rows_NH, *others = wide_NH.chunk(1 + levels, dim=1)
    return EncodedRows(rows_NH=rows_NH, levels=tuple(others)).simplest()
