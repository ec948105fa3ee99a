"""Merging by Triton's kernels: all streams in one launch, and all their gradients in another.

Text is read from the word table in place, and the table's gradient is summed from the merged one:
no rows of text are ever there, save where tensor parallelism has to add up those of several parts
of a vocabulary. Values are those of ``merge`` and ``lookup``; sums of gradients differ in their
order alone.

Legend: S sequence, B micro-batch, L = S * B places, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.alignment.row_index import RowIndex, kernels_for
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.model.merging.host_memory import empty_like_rows
from megatron.core.models.mimo.model.merging.lookup import call_as, is_plain_table, zero_table
from megatron.core.utils import get_pg_size


def place_by_kernels(
    kernels: ModuleType,
    plan: AlignmentPlan,
    out_SBH: torch.Tensor,
    rows: Mapping[str, torch.Tensor],
    *,
    base_SBH: torch.Tensor | None = None,
) -> None:
    """Write [S, B, H]: the rows of all streams at their places, added to ``base_SBH`` if given."""
    index = _index_of(plan)
    kernels.place(
        out_SBH.view(-1, out_SBH.size(-1)),
        [rows.get(name) for name in index.names],
        index.sources_L,
        base_LH=None if base_SBH is None else base_SBH.view(-1, base_SBH.size(-1)),
    )


def take_by_kernels(
    kernels: ModuleType, plan: AlignmentPlan, grad_SBH: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Gradients [N, H] of these streams: all modalities in one launch, text in another.

    Under sequence parallelism, of the rows alone that were placed here, in the order of the plan.
    """
    grad_LH = grad_SBH.reshape(-1, grad_SBH.size(-1)).contiguous()
    found = _empty_gradients(plan, grad_LH, names)
    if found:
        index = _index_of(plan)
        kernels.gather_sums(grad_LH, index, [found.get(name) for name in index.names])
    if TEXT in names:
        found[TEXT] = kernels.look_up(grad_LH, plan.streams[TEXT].rows_N)
    return found


def reads_table(
    table: torch.nn.Module, plan: AlignmentPlan, rows: Mapping[str, torch.Tensor]
) -> bool:
    """Whether ``merge_with_table`` can be used: a plain table that no hook looks into."""
    if not is_plain_table(table) or plan.pieces:
        return False
    if table._forward_hooks or table._backward_hooks or table._backward_pre_hooks:
        return False
    weight_VH: Any = table.weight
    return kernels_for(plan.index, weight_VH, *rows.values()) is not None


def merge_with_table(
    table: Any, plan: AlignmentPlan, rows: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Merged embeddings [S_local, B, H] of text, read from its table, and of modality rows.

    Where the vocabulary is divided over tensor-parallel ranks, they take part in one all-reduce of
    the rows of text [N, H], forward only, as in ``look_up_text``.

    Args:
        table: Megatron's, which ``reads_table`` has agreed to; its hooks before a call run.
        plan: this rank's plan, without pieces of other ranks.
        rows: modality -> [N, H], in the dtype of the table.
    """
    group = table.tp_group if get_pg_size(table.tp_group) > 1 else None

    def forward(_: torch.Tensor) -> torch.Tensor:
        first = table.vocab_start_index
        return merge_from_table(table.weight, plan, rows, first=first, group=group)

    return call_as(table, forward, plan.text_ids_N.unsqueeze(0))


def merge_from_table(
    weight_VH: torch.Tensor,
    plan: AlignmentPlan,
    rows: Mapping[str, torch.Tensor],
    *,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """``merge_with_table`` of a table's weight.

    Args:
        weight_VH: this rank's part of the table.
        plan: this rank's plan, with an index.
        rows: modality -> [N, H].
        first: token id of the part's first row.
        group: ranks that have the other parts; None where this is the whole table.
    """
    merged_SBH: torch.Tensor = _MergeWithTable.apply(
        weight_VH, plan, first, group, tuple(rows), *rows.values()
    )
    return merged_SBH


class _MergeWithTable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight_VH: torch.Tensor,
        plan: AlignmentPlan,
        first: int,
        group: dist.ProcessGroup | None,
        names: tuple[str, ...],
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.plan, ctx.names, ctx.first, ctx.shape = plan, names, first, weight_VH.shape
        index = _index_of(plan)
        kernels = kernels_for(index, weight_VH)
        assert kernels is not None, "reads_table has said so"
        text_NH, ids_N = weight_VH, plan.text_ids_N
        if group is not None:
            text_NH = kernels.look_up(weight_VH, ids_N, first)
            dist.all_reduce(text_NH, group=group)
        given = {TEXT: text_NH, **dict(zip(names, rows, strict=True))}
        shape = (plan.sequence_length, plan.batch_size, weight_VH.size(1))
        merged_SBH = empty_like_rows(shape, weight_VH)
        kernels.place(
            merged_SBH.view(-1, weight_VH.size(1)),
            [given.get(name) for name in index.names],
            index.sources_L,
            ids_N=ids_N if group is None else None,
            first=first,
        )
        return merged_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        plan, needed = ctx.plan, ctx.needs_input_grad[5:]
        index = _index_of(plan)
        grad_LH = grad_outputs[0].reshape(-1, ctx.shape[1]).contiguous()
        kernels = kernels_for(index, grad_LH)
        assert kernels is not None, "the gradient is of the dtype of the merged rows"
        wanted = [name for name, wanted in zip(ctx.names, needed, strict=True) if wanted]
        found = _empty_gradients(plan, grad_LH, wanted)
        if ctx.needs_input_grad[0]:
            found[TEXT] = zero_table(ctx.shape, grad_LH)
        if found:
            outs = [found.get(name) for name in index.names]
            kernels.gather_sums(grad_LH, index, outs, first=ctx.first)
        return found.get(TEXT), None, None, None, None, *(found.get(name) for name in ctx.names)


def _index_of(plan: AlignmentPlan) -> RowIndex:
    assert plan.index is not None, "kernels_for has looked at it"
    return plan.index


def _empty_gradients(
    plan: AlignmentPlan, grad_LH: torch.Tensor, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Where the gradients of modality rows are written."""
    own_order = bool(plan.pieces) or plan.own_rows
    counts = {
        name: plan.streams[name].rows_N.numel() if own_order else plan.counts[name]
        for name in names
        if name != TEXT
    }
    return {name: grad_LH.new_empty(count, grad_LH.size(1)) for name, count in counts.items()}
