"""Word embeddings of the text tokens that this rank holds. Legend: N text tokens, H hidden, V
vocabulary, of which a tensor-parallel rank holds a contiguous part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.models.mimo.model.host_memory import host_zeros
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.utils import get_pg_rank, get_pg_size


def look_up_text(word_embeddings: torch.nn.Module, plan: AlignmentPlan) -> torch.Tensor:
    """Word embeddings [N, H] of ``plan.text_ids_N``: placeholders are never looked up.

    Three ways to the same rows. On one rank on CPU the table is read directly, because its
    gradient can then be made without touching the rows of tokens that do not occur. Under
    sequence parallelism each rank gets only the rows of its own positions. Otherwise the module
    is called; under tensor parallelism its ranks take part in one all-reduce of [N, H].

    Raises:
        UnsupportedError: sequence parallelism with an embedding that is not Megatron's.
    """
    if plan.pieces:
        if not _is_plain(word_embeddings):
            raise UnsupportedError(
                "sequence parallelism needs Megatron's VocabParallelEmbedding for the word "
                f"embeddings, got {type(word_embeddings).__name__}; turn sequence parallelism off"
            )
        run_forward_pre_hooks(word_embeddings, plan.text_ids_N)
        ids = tuple(piece.text_ids_N for piece in plan.pieces)
        text_NH: torch.Tensor = _ShardedLookup.apply(
            word_embeddings.weight, ids, word_embeddings.vocab_start_index, word_embeddings.tp_group
        )
    elif plan.text_ids_N.device.type == "cpu" and _is_unobserved_table(word_embeddings):
        text_NH = _CpuLookup.apply(word_embeddings.weight, plan.text_ids_N)
    else:
        text_NH = word_embeddings(plan.text_ids_N.unsqueeze(0)).squeeze(0)
    return text_NH


def run_forward_pre_hooks(module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """What a call of ``module`` does first: data parallelism waits for its parameters there."""
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, inputs)


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) is VocabParallelEmbedding and getattr(module, "gtp_remat_size", 1) == 1


def _is_unobserved_table(module: torch.nn.Module) -> bool:
    # Hooks wait for gathered parameters or observe outputs: only a call of the module runs them.
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
    return _is_plain(module) and get_pg_size(module.tp_group) == 1 and not hooked


class _CpuLookup(torch.autograd.Function):
    """Table lookup whose [V, H] gradient touches only the rows of tokens that occur."""

    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids_N)
        ctx.shape, ctx.dtype = weight_VH.shape, weight_VH.dtype
        return weight_VH.index_select(0, ids_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (ids_N,) = ctx.saved_tensors
        grad_VH = host_zeros(ctx.shape, ctx.dtype)
        return grad_VH.index_add_(0, ids_N, grad_outputs[0]), None


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
    ) -> torch.Tensor:
        ctx.ids, ctx.vocab_start, ctx.group = ids, vocab_start, group
        ctx.shape = weight_VH.shape
        rank = get_pg_rank(group)
        mine_NH = weight_VH.new_empty(ids[rank].numel(), weight_VH.size(1))
        for owner, ids_N in enumerate(ids):
            if not ids_N.numel():
                continue
            local_N, foreign_N1 = _localise(ids_N, vocab_start, weight_VH.size(0))
            part_NH = weight_VH.index_select(0, local_N).masked_fill_(foreign_N1, 0)
            dist.reduce(part_NH, group_dst=owner, group=group)
            if owner == rank:
                mine_NH = part_NH
        return mine_NH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_NH = grad_outputs[0].contiguous()
        grad_VH = grad_NH.new_zeros(ctx.shape)
        rank = get_pg_rank(ctx.group)
        for owner, ids_N in enumerate(ctx.ids):
            if not ids_N.numel():
                continue
            part_NH = grad_NH if owner == rank else grad_NH.new_empty(ids_N.numel(), ctx.shape[1])
            dist.broadcast(part_NH, group_src=owner, group=ctx.group)
            local_N, foreign_N1 = _localise(ids_N, ctx.vocab_start, ctx.shape[0])
            # index_put_ adds in a fixed order on a GPU, index_add_ does not
            grad_VH.index_put_((local_N,), part_NH.masked_fill(foreign_N1, 0), accumulate=True)
        return grad_VH, None, None, None


def _localise(
    ids_N: torch.Tensor, vocab_start: int, vocab_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as rows of this rank's part of the table, and [N, 1] True where they are another's."""
    local_N = ids_N - vocab_start
    foreign_N = (local_N < 0) | (local_N >= vocab_rows)
    return local_N.masked_fill(foreign_N, 0), foreign_N.unsqueeze(1)
