"""Levels of encoder rows on their way into decoder layers (deepstack).

Legend: S sequence, B micro-batch, H hidden, N rows of one modality; ``S_local`` after
context/sequence sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import AlignmentPlan, EncodedRows, Stream
from megatron.core.models.mimo.alignment.row_index import kernels_for
from megatron.core.models.mimo.model.batch.checks import check_rows
from megatron.core.models.mimo.model.merging.merge import exchange_rows, gradients_of_rows
from megatron.core.models.mimo.model.merging.merge_by_kernels import place_by_kernels


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelRows:
    """One level of the rows of a micro-batch, and where they go.

    Attributes:
        rows: modality -> [N, H], the same on every rank of ``tp_group``.
        plan: this rank's plan, which is that of the rows themselves.
        tp_group: ranks that each place a part of the rows under sequence parallelism.
    """

    rows: Mapping[str, torch.Tensor]
    plan: AlignmentPlan
    tp_group: dist.ProcessGroup | None

    def add_to(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Hidden states [S_local, B, H] with each row added at its position; a new tensor.

        Differentiable in both. With a sequence-parallel plan, all ranks of ``tp_group`` take part
        in backward: each broadcasts the gradient of the rows that it placed.
        """
        added_SBH: torch.Tensor = _AddRows.apply(
            hidden_SBH, self.plan, self.tp_group, tuple(self.rows), *self.rows.values()
        )
        return added_SBH

    def own(self) -> LevelRows:
        """The same level, with only the rows that have a place on this rank, in its plan's order.

        Differentiable. With a sequence-parallel plan, all ranks of ``tp_group`` take part in
        backward, as in ``add_to``; using what is returned is then a matter of this rank alone.
        """
        rows = {}
        for name, rows_NH in self.rows.items():
            stream = self.plan.streams[name]
            if stream.sources_N is not None:
                pieces = tuple(piece.streams[name] for piece in self.plan.pieces)
                rows_NH = _OwnRows.apply(rows_NH, stream.sources_N, pieces, self.tp_group)
            rows[name] = rows_NH
        return LevelRows(rows=rows, plan=plan_of_own_rows(self.plan), tp_group=None)


def plan_of_own_rows(plan: AlignmentPlan) -> AlignmentPlan:
    """The plan of rows that are in its order already, where they have no place elsewhere."""
    streams = {
        name: replace(stream, sources_N=None, runs=None) for name, stream in plan.streams.items()
    }
    return replace(plan, streams=streams, pieces=(), index=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedSequence:
    """What the decoder reads.

    Attributes:
        hidden_SBH: text and modality rows together, or what the layers before have made of them:
            [S_local, B, H].
        levels: what decoder layers add, from the first layer of this pipeline stage on: level l
            goes into the output of its layer l, and of a later stage's where it has fewer.
    """

    hidden_SBH: torch.Tensor
    levels: tuple[LevelRows, ...] = ()


def place_levels(
    encoded: Mapping[str, EncodedRows],
    plan: AlignmentPlan,
    *,
    hidden_size: int,
    tp_group: dist.ProcessGroup | None,
) -> tuple[LevelRows, ...]:
    """The levels of all modalities, level by level; () where no modality has any.

    Args:
        encoded: modality -> its rows; those that have rows in this micro-batch.
        plan: this rank's plan.
        hidden_size: H of the language model.
        tp_group: the language model's tensor-parallel ranks.

    Raises:
        InputError: a level of another width.
    """
    for name, one in encoded.items():
        for level_NH in one.levels:
            check_rows(f"a level of {name}", level_NH, hidden_size, one.rows_NH.dtype)
    return tuple(
        LevelRows(
            rows={name: one.levels[number] for name, one in encoded.items() if one.levels[number:]},
            plan=plan,
            tp_group=tp_group,
        )
        for number in range(max((len(one.levels) for one in encoded.values()), default=0))
    )


class _OwnRows(torch.autograd.Function):
    """Rows that have a place here; ranks with a piece of the sequence each exchange gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: torch.Tensor,
        sources_n: torch.Tensor,
        pieces: tuple[Stream, ...],
        tp_group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.count, ctx.sources_n = rows_NH.size(0), sources_n
        ctx.pieces, ctx.tp_group = pieces, tp_group
        return rows_NH.index_select(0, sources_n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grad_nH = grad_outputs[0]
        if ctx.pieces:
            grad_NH = exchange_rows(grad_nH, ctx.pieces, ctx.count, ctx.tp_group)
        else:
            grad_NH = grad_nH.new_zeros(ctx.count, grad_nH.size(1))
            grad_NH.index_copy_(0, ctx.sources_n, grad_nH)
        return grad_NH, None, None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SBH: torch.Tensor,
        plan: AlignmentPlan,
        tp_group: dist.ProcessGroup | None,
        names: tuple[str, ...],
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.plan, ctx.tp_group, ctx.names = plan, tp_group, names
        ctx.kinds = [(rows_NH.size(0), rows_NH.dtype) for rows_NH in rows]
        kernels = kernels_for(plan.index, hidden_SBH, *rows)
        if kernels is not None:
            base_SBH = hidden_SBH.contiguous()
            added_SBH = torch.empty_like(base_SBH)
            place_by_kernels(
                kernels, plan, added_SBH, dict(zip(names, rows, strict=True)), base_SBH=base_SBH
            )
            return added_SBH
        added_SBH = hidden_SBH.clone(memory_format=torch.contiguous_format)
        flat_NH = added_SBH.view(-1, added_SBH.size(-1))
        for name, rows_NH in zip(names, rows, strict=True):
            stream = plan.streams[name]
            if stream.sources_N is not None:
                rows_NH = rows_NH.index_select(0, stream.sources_N)
            flat_NH.index_add_(0, stream.rows_N, rows_NH.to(flat_NH.dtype))
        return added_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grad_SBH = grad_outputs[0]
        grads = gradients_of_rows(
            grad_SBH,
            ctx.plan,
            names=ctx.names,
            counts=[count for count, _ in ctx.kinds],
            needed=ctx.needs_input_grad[4:],
            group=ctx.tp_group,
        )
        cast = [
            None if grad_NH is None else grad_NH.to(dtype)
            for grad_NH, (_, dtype) in zip(grads, ctx.kinds, strict=True)
        ]
        return grad_SBH if ctx.needs_input_grad[0] else None, None, None, None, *cast
