"""The inverse of a plan, for kernels: for each place the row it takes, for each row its places.

``Stream`` names the place of every row, which suits copies of one stream after the other. A kernel
that serves all streams at once asks which row a place takes. The tensors are made on the host,
where token ids can be sorted: the gradient of a word is then a sum over a segment, in fixed order.

Legend: L places of the merged sequence (``s * B + b``), N rows of one stream, E entries of sums,
U sums, ``S_local`` after context/sequence sharding.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from megatron.core.models.mimo.alignment.plan import AlignmentPlan, Stream
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError

ROW_BITS = 40
"""A stream's number and a row of it are one int64: ``number << ROW_BITS | row``."""

PARTIAL = 30
"""Number of the stream that parts of long sums go to; no stream of rows has it."""

LONGEST_SUM = 64
"""Rows that one sum adds at most: that of a frequent word is a sum of sums."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowIndex:
    """Index tensors of a plan for the kernels that place rows and gather their gradients.

    A sum adds some places of the merged gradient, its entries, into a row of a stream. Sums of
    text come first; of a word's places there are as many sums as ``LONGEST_SUM`` asks for. Each
    modality row has one sum, of one place or none. Under sequence parallelism words have none:
    they are looked up, and their gradients summed, piece by piece.

    Attributes:
        names: the streams by number; the text's is 0.
        sources_L: int64 [L], the row that each place takes; of text, the number of the row.
        entries_E: int32 [E], places, sum by sum.
        starts_U: int32 [U + 1], where each sum's entries begin.
        targets_U: int64 [U], the row that takes the sum; of text, the token id or a part's number.
        text_sums: how many sums are of text.
        parts: how many of these are parts of longer sums.
        part_starts_W: int32 [W + 1], for each word with several parts, where its parts begin.
        part_targets_W: int64 [W], its token id.
    """

    names: tuple[str, ...]
    sources_L: torch.Tensor
    entries_E: torch.Tensor
    starts_U: torch.Tensor
    targets_U: torch.Tensor
    text_sums: int
    parts: int
    part_starts_W: torch.Tensor
    part_targets_W: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RowIndex:
        """The same index with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def with_row_index(plan: AlignmentPlan) -> AlignmentPlan:
    """A plan by which Triton's kernels place rows and gather their gradients, on a GPU.

    Call it last, on the host, with a plan that is cut for this rank. Where the kernels cannot serve
    (no Triton, another dtype, many modalities), rows are placed as without an index.

    Raises:
        InputError: a plan that lies on a device.
    """
    if plan.text_ids_N.device.type != "cpu":
        raise InputError(
            f"the alignment plan lies on {plan.text_ids_N.device}; index it on the host, before "
            "it is moved"
        )
    names = (TEXT, *(name for name in plan.streams if name != TEXT))
    sources_L = torch.full((plan.sequence_length * plan.batch_size,), -1)
    for number, name in enumerate(names):
        stream = plan.streams[name]
        sources_N = stream.sources_N
        if sources_N is None:
            sources_N = torch.arange(stream.rows_N.numel())
        sources_L[stream.rows_N] = sources_N + (number << ROW_BITS)
    ids_N = plan.text_ids_N[:0] if plan.pieces else plan.text_ids_N
    sorted_ids_N, order_N = ids_N.long().sort(stable=True)
    entries_of = [plan.streams[TEXT].rows_N[order_N]]
    lengths_U, targets_U, part_starts_W, part_targets_W = _sums_of_words(sorted_ids_N)
    lengths_of, targets_of = [lengths_U], [targets_U]
    own_order = bool(plan.pieces) or plan.own_rows
    for number, name in enumerate(names[1:], start=1):
        stream = plan.streams[name]
        count = stream.rows_N.numel() if own_order else plan.counts[name]
        rows_N, lengths_N = _places_of_rows(stream, count, own_order=own_order)
        entries_of.append(rows_N)
        lengths_of.append(lengths_N)
        targets_of.append(torch.arange(count) + (number << ROW_BITS))
    ends_U = torch.cat(lengths_of).cumsum(0)
    index = RowIndex(
        names=names,
        sources_L=sources_L,
        entries_E=torch.cat(entries_of).int(),
        starts_U=torch.cat([ends_U.new_zeros(1), ends_U]).int(),
        targets_U=torch.cat(targets_of),
        text_sums=targets_U.numel(),
        parts=int(part_starts_W[-1]),
        part_starts_W=part_starts_W.int(),
        part_targets_W=part_targets_W,
    )
    return replace(plan, index=index)


def kernels_for(index: RowIndex | None, *tensors: torch.Tensor) -> ModuleType | None:
    """The kernels (``row_kernels``), where they can be used for these tensors; else None.

    They run on a GPU; on the CPU where Triton's interpreter runs them, and nothing else there.
    """
    if index is None:
        return None
    kernels = _kernels()
    if kernels is None or len(index.names) > kernels.MOST_STREAMS:
        return None
    served = all(
        one.dtype in kernels.DTYPES and (one.device.type == "cpu") == kernels.INTERPRETED
        for one in tensors
    )
    return kernels if served else None


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("megatron.core.models.mimo.alignment.row_kernels")
    except ImportError:  # a Triton that does not load
        return None


def _places_of_rows(
    stream: Stream, count: int, *, own_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of a modality's rows, row by row, and how many each row has: 1 or 0."""
    if own_order or stream.sources_N is None:
        return stream.rows_N, torch.ones(count, dtype=torch.long)
    place_N = torch.full((count,), -1)
    place_N[stream.sources_N] = stream.rows_N
    is_placed_N = place_N >= 0
    return place_N[is_placed_N], is_placed_N.long()


def _sums_of_words(
    sorted_ids_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths and targets of the sums of text, and starts and targets of the sums of parts."""
    ids_W, counts_W = torch.unique_consecutive(sorted_ids_N, return_counts=True)
    sums_W = (counts_W + LONGEST_SUM - 1) // LONGEST_SUM
    lengths_U = torch.full((int(sums_W.sum()),), LONGEST_SUM)
    lengths_U[sums_W.cumsum(0) - 1] = counts_W - LONGEST_SUM * (sums_W - 1)  # each word's last
    is_long_W = sums_W > 1
    is_part_U = is_long_W.repeat_interleave(sums_W)
    part_U = is_part_U.long().cumsum(0) - 1 + (PARTIAL << ROW_BITS)
    targets_U = torch.where(is_part_U, part_U, ids_W.repeat_interleave(sums_W))
    part_ends_W = sums_W[is_long_W].cumsum(0)
    part_starts_W = torch.cat([part_ends_W.new_zeros(1), part_ends_W])
    return lengths_U, targets_U, part_starts_W, ids_W[is_long_W]
