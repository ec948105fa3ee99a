"""Context parallelism: a rank's tokens of all heads against all tokens of a rank's heads.

The convolution and the state pass along the sequence, which context parallelism has dealt out in
chunks. One exchange gives every rank whole sequences of its share of the heads; a second one brings
the outputs back. The results are those of one process to the last bit of each head's sums.

Legend: S_local tokens of a rank, S = cp * S_local tokens of all, B rows, G key heads of a
tensor-parallel rank, D numbers for each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.alignment.cut import SequenceCut

__all__ = ["Dealt", "deal_evenly", "deal_places", "swap", "to_heads", "to_tokens"]


class Dealt(NamedTuple):
    """How context parallelism has dealt out the tokens of a row.

    Attributes:
        sequence_S: where the token of each position lies among those of rank 0, rank 1 and so on.
        ranks_S: the inverse: the position of each of these.
    """

    sequence_S: Tensor
    ranks_S: Tensor


@functools.lru_cache(maxsize=8)
def deal_evenly(tokens: int, size: int, device: torch.device) -> Dealt:
    """How the tokens of rows that are not packed are dealt out.

    Args:
        tokens: S.
        size: cp.
        device: of the tensors.

    Raises:
        InputError: S is not divisible by 2 * cp.
    """
    return _deal(tokens, size, device, None)


def deal_places(tokens: int, size: int, places: Tensor) -> Dealt:
    """How the tokens of a packed row are dealt out, document by document.

    Args:
        tokens: S.
        size: cp.
        places: summed lengths of the documents' places, where the tokens are.

    Raises:
        InputError: S is not divisible by 2 * cp.
    """
    return _deal(tokens, size, places.device, places)


def to_heads(x_SBGD: Tensor, order: Dealt, group: dist.ProcessGroup) -> Tensor:
    """[S_local, B, G, D] as [S, B, G / cp, D], in the order of the sequence.

    Collective over the group, forward and backward (which is ``to_tokens``): every rank calls it
    with the same shapes.
    """
    parts = x_SBGD.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)
    received = swap(parts, group).flatten(0, 1)
    return _Reorder.apply(received, order.sequence_S, order.ranks_S)


def to_tokens(x_SBGD: Tensor, order: Dealt, group: dist.ProcessGroup) -> Tensor:
    """[S, B, G / cp, D] as [S_local, B, G, D]: the inverse, and the adjoint, of ``to_heads``.

    Collective over the group, forward and backward: every rank calls it with the same shapes.
    """
    by_rank = _Reorder.apply(x_SBGD, order.ranks_S, order.sequence_S)
    received = swap(by_rank.unflatten(0, (group.size(), -1)), group)  # [cp, S_local, B, G / cp, D]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _deal(tokens: int, size: int, device: torch.device, places: Tensor | None) -> Dealt:
    cut = SequenceCut(cp_size=size, places=places)
    positions = [
        cut.of_rank(cp_rank=rank, tp_rank=0).context_positions(tokens) for rank in range(size)
    ]
    ranks_S = torch.cat(positions).to(device, non_blocking=True)
    return Dealt(sequence_S=ranks_S.argsort(), ranks_S=ranks_S)


class _Reorder(torch.autograd.Function):
    """Rows in another order; the adjoint is the inverse order, without sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(gradient, inverse, order), None, None


def swap(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part r of every rank, on rank r, in the order of the ranks: [cp, ...] as [cp, ...].

    Collective over the group, forward and backward (which is itself): every rank calls it with the
    same shapes.
    """
    result: Tensor = _Swap.apply(parts, group)
    return result


class _Swap(torch.autograd.Function):
    """Part r of every rank, on rank r, in the order of the ranks; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(gradient, ctx.group), None
