"""Embeddings of the tokens and positions that this rank holds. Legend: N text tokens, H hidden, V
vocabulary, of which a tensor-parallel rank holds a contiguous part.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.alignment.row_index import kernels_for
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.models.mimo.model.merging.host_memory import host_zeros
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size


def look_up_text(word_embeddings: torch.nn.Module, plan: AlignmentPlan) -> torch.Tensor:
    """Word embeddings [N, H] of ``plan.text_ids_N``: placeholders are never looked up.

    Megatron's table is read here, with a gradient that is summed in fp32; the module's hooks run
    as in any call of it. Under sequence parallelism each rank gets only the rows of its own
    positions; under tensor parallelism alone its ranks take part in one all-reduce of [N, H].
    Another kind of embedding is called as it is.

    Raises:
        UnsupportedError: sequence parallelism with an embedding that is not Megatron's.
    """
    is_plain = is_plain_table(word_embeddings)
    if plan.pieces and not is_plain:
        raise UnsupportedError(
            "sequence parallelism needs Megatron's VocabParallelEmbedding for the word "
            f"embeddings, got {type(word_embeddings).__name__}; turn sequence parallelism off"
        )
    pieces = tuple(piece.text_ids_N for piece in plan.pieces)

    def forward(ids_1N: torch.Tensor) -> torch.Tensor:
        assert isinstance(word_embeddings, VocabParallelEmbedding)
        weight_VH, first = word_embeddings.weight, word_embeddings.vocab_start_index
        group = word_embeddings.tp_group
        if pieces:
            kernels = kernels_for(plan.index, weight_VH)
            mine_NH: torch.Tensor = _ShardedLookup.apply(weight_VH, pieces, first, group, kernels)
            return mine_NH.unsqueeze(0)
        is_cut = get_pg_size(group) > 1
        rows_1NH = look_up_rows(weight_VH, ids_1N, first if is_cut else None)
        if is_cut:
            rows_1NH = reduce_from_tensor_model_parallel_region(rows_1NH, group=group)
        return rows_1NH

    ids_1N = plan.text_ids_N.unsqueeze(0)
    text_1NH: torch.Tensor = (
        call_as(word_embeddings, forward, ids_1N) if is_plain else word_embeddings(ids_1N)
    )
    return text_1NH.squeeze(0)


def call_as(
    module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """Call ``module`` with another ``forward`` in place of its own; its hooks run as ever.

    Data parallelism waits for gathered parameters in such a hook, so ``forward`` has to read the
    parameters itself: before the call they may not be there.
    """
    object.__setattr__(module, "forward", forward)
    try:
        output: torch.Tensor = module(inputs)
    finally:
        object.__delattr__(module, "forward")
    return output


def look_up_rows(
    weight_VH: torch.Tensor, ids: torch.Tensor, first: int | None = None
) -> torch.Tensor:
    """Rows of a table, [*ids.shape, H], with a gradient that is summed in fp32.

    Args:
        weight_VH: the table, or this rank's part of one.
        ids: which rows.
        first: row of the whole table that a part begins with; rows of other parts are zeros.
    """
    rows_NH: torch.Tensor = _Lookup.apply(weight_VH, ids.reshape(-1), first)
    return rows_NH.view(*ids.shape, weight_VH.size(1))


def is_plain_table(module: torch.nn.Module) -> bool:
    """Whether it is Megatron's own table of words, called as Megatron does."""
    return (
        type(module) is VocabParallelEmbedding
        and getattr(module, "gtp_remat_size", 1) == 1
        and "forward" not in vars(module)
    )


def add_rows(table_VH: torch.Tensor, ids_N: torch.Tensor, rows_NH: torch.Tensor) -> None:
    """Add each row to the row of the table that its id names, in place.

    A row of the table is the sum in fp32, rounded once to its dtype: in bf16 a sum of some
    hundred rows, added one by one, stops growing. Takes memory for [N, H] in fp32, not for
    [V, H], and adds in a fixed order. The host waits for nothing.
    """
    if table_VH.dtype.itemsize >= 4:
        _add_in_order(table_VH, ids_N, rows_NH)
        return
    numbers_N = torch.arange(ids_N.numel(), device=ids_N.device)
    first_V = numbers_N.new_zeros(table_VH.size(0))
    first_V.scatter_reduce_(0, ids_N, numbers_N, "amin", include_self=False)
    slots_N = first_V.index_select(0, ids_N)  # where an id occurs first
    sums_NH = torch.zeros_like(rows_NH, dtype=torch.float32)
    _add_in_order(sums_NH, slots_N, rows_NH.float())
    sums_NH = sums_NH.index_select(0, slots_N).add_(table_VH.index_select(0, ids_N))
    # every occurrence of an id writes the same
    table_VH.index_copy_(0, ids_N, sums_NH.to(table_VH.dtype))


def _add_in_order(table_VH: torch.Tensor, ids_N: torch.Tensor, rows_NH: torch.Tensor) -> None:
    if table_VH.device.type == "cpu":
        table_VH.index_add_(0, ids_N, rows_NH)
    else:  # on a GPU index_add_ adds in any order
        table_VH.index_put_((ids_N,), rows_NH, accumulate=True)


def zero_table(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Zeros of a table's shape, with the dtype and device of ``like``."""
    return host_zeros(shape, like.dtype) if like.device.type == "cpu" else like.new_zeros(shape)


class _Lookup(torch.autograd.Function):
    """Table lookup; on CPU its [V, H] gradient touches only the rows of tokens that occur."""

    @staticmethod
    def forward(
        ctx: Any, weight_VH: torch.Tensor, ids_N: torch.Tensor, first: int | None
    ) -> torch.Tensor:
        ctx.shape, ctx.foreign_N1 = weight_VH.shape, None
        if first is None:
            ctx.ids_N = ids_N
            return weight_VH.index_select(0, ids_N)
        ctx.ids_N, ctx.foreign_N1 = _localise(ids_N, first, weight_VH.size(0))
        return weight_VH.index_select(0, ctx.ids_N).masked_fill_(ctx.foreign_N1, 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_NH = grad_outputs[0]
        if ctx.foreign_N1 is not None:
            grad_NH = grad_NH.masked_fill(ctx.foreign_N1, 0)
        grad_VH = zero_table(ctx.shape, grad_NH)
        add_rows(grad_VH, ctx.ids_N, grad_NH)
        return grad_VH, None, None


class _ShardedLookup(torch.autograd.Function):
    """Lookup in a vocabulary cut over a group, of a sequence cut over the same group.

    Rank r holds some rows of the table and some positions of the sequence. In forward the ranks
    look up the ids of each rank's positions in turn and reduce the rows to that rank; in backward
    each rank in turn broadcasts its gradient rows. No rank ever holds more than one rank's part
    of the sequence. All ranks of the group take part, with the same ``ids``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_VH: torch.Tensor,
        ids: tuple[torch.Tensor, ...],
        vocab_start: int,
        group: dist.ProcessGroup,
        kernels: ModuleType | None,
    ) -> torch.Tensor:
        ctx.ids, ctx.vocab_start, ctx.group = ids, vocab_start, group
        ctx.shape = weight_VH.shape
        rank = get_pg_rank(group)
        mine_NH = weight_VH.new_empty(ids[rank].numel(), weight_VH.size(1))
        for owner, ids_N in enumerate(ids):
            if not ids_N.numel():
                continue
            if kernels is not None:
                part_NH = kernels.look_up(weight_VH, ids_N, vocab_start)
            else:
                local_N, foreign_N1 = _localise(ids_N, vocab_start, weight_VH.size(0))
                part_NH = weight_VH.index_select(0, local_N).masked_fill_(foreign_N1, 0)
            dist.reduce(part_NH, group_dst=owner, group=group)
            if owner == rank:
                mine_NH = part_NH
        return mine_NH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        grad_NH = grad_outputs[0].contiguous()
        grad_VH = zero_table(ctx.shape, grad_NH)
        rank = get_pg_rank(ctx.group)
        for owner, ids_N in enumerate(ctx.ids):
            if not ids_N.numel():
                continue
            part_NH = grad_NH if owner == rank else grad_NH.new_empty(ids_N.numel(), ctx.shape[1])
            dist.broadcast(part_NH, group_src=owner, group=ctx.group)
            local_N, foreign_N1 = _localise(ids_N, ctx.vocab_start, ctx.shape[0])
            add_rows(grad_VH, local_N, part_NH.masked_fill(foreign_N1, 0))
        return grad_VH, None, None, None, None


def _localise(
    ids_N: torch.Tensor, vocab_start: int, vocab_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as rows of this rank's part of the table, and [N, 1] True where they are another's."""
    local_N = ids_N - vocab_start
    foreign_N = (local_N < 0) | (local_N >= vocab_rows)
    return local_N.masked_fill(foreign_N, 0), foreign_N.unsqueeze(1)
