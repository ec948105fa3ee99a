"""Cross-entropy over a vocabulary, piece by piece: the logits are never there all at once.

A sequence of 8,192 tokens over 150,000 words has logits of 4.9 GB in fp32, and the plain loss holds
several tensors of this size. Here tokens are taken a few hundred at a time. What is kept for the
backward pass is one number per token; there the logits are computed a second time, a few thousand
words at a time.

Legend: T tokens, H hidden, V this rank's part of the vocabulary, C tokens or words of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["chunked_cross_entropy"]

_PIECE = 128 * 2**20  # bytes of the fp32 logits of a piece
_ALIGNED = 64  # products of half precision are slow on a GPU where a size is no multiple of 8


def chunked_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    first: int,
    group: dist.ProcessGroup,
    piece: int = _PIECE,
) -> Tensor:
    """The loss of each token, fp32 [T]; its gradients reach ``hidden_TH`` and ``weight_VH``.

    Collective over ``group``: two reductions of [T] numbers forward, none backward; the gradient
    of ``hidden_TH`` is this rank's part of a sum.

    Args:
        hidden_TH: what the output layer is given, the same on all ranks of the group.
        weight_VH: this rank's rows of the output layer, without padding; V may be 0.
        labels_T: int64 token ids; all are in some rank's part.
        first: token of this rank's first row.
        group: the ranks that the vocabulary is divided over.
        piece: bytes that the fp32 logits of a piece may take.
    """
    losses_T: Tensor = _ChunkedCrossEntropy.apply(
        hidden_TH, weight_VH, labels_T, first, group, piece
    )
    return losses_T


def _pieces(rows: int, width: int, piece: int) -> Iterator[slice]:
    """Rows of fp32 numbers [rows, width], so many at a time that they take ``piece`` bytes."""
    step = max(piece // (4 * max(width, 1)), 1)
    step -= step % _ALIGNED if step > _ALIGNED else 0
    return (slice(start, start + step) for start in range(0, rows, step))


def _exponentials(logits_CV: Tensor, scale_C: Tensor) -> Tensor:
    """fp32 exp(logits - scale), in place where the logits are fp32.

    A pass over a piece reads and writes all of it: none is there to change its type alone.
    """
    place = logits_CV if logits_CV.dtype == torch.float32 else None
    return torch.sub(logits_CV, scale_C[:, None], out=place).exp_()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        first: int,
        group: dist.ProcessGroup,
        piece: int,
    ) -> Tensor:
        tokens, words = len(hidden_TH), len(weight_VH)
        own_T = labels_T - first
        is_own_T = (own_T >= 0) & (own_T < words)
        own_T = own_T.where(is_own_T, 0)
        largest_T = torch.full_like(own_T, torch.finfo(torch.float32).min, dtype=torch.float32)
        sums_2T = hidden_TH.new_zeros((2, tokens), dtype=torch.float32)  # of exponentials; label's
        for at in _pieces(tokens, words, piece) if words else ():
            logits_CV = hidden_TH[at] @ weight_VH.t()
            sums_2T[1, at] = logits_CV.gather(1, own_T[at, None])[:, 0].float()
            largest_T[at] = logits_CV.amax(dim=1).float()
            sums_2T[0, at] = _exponentials(logits_CV, largest_T[at]).sum(dim=1)
        sums_2T[1] *= is_own_T
        if group.size() > 1:
            everywhere_T = largest_T.clone()
            dist.all_reduce(everywhere_T, op=dist.ReduceOp.MAX, group=group)
            sums_2T[0] *= (largest_T - everywhere_T).exp()
            largest_T = everywhere_T
            dist.all_reduce(sums_2T, group=group)
        scale_T = sums_2T[0].log() + largest_T  # the logarithm of the sum of exponentials
        ctx.save_for_backward(hidden_TH, weight_VH, own_T, is_own_T, scale_T)
        ctx.piece = piece
        return scale_T - sums_2T[1]

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Any, ...]:
        hidden_TH, weight_VH, own_T, is_own_T, scale_T = ctx.saved_tensors
        tokens, words = len(hidden_TH), len(weight_VH)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # Pieces are of the vocabulary: of a weight, the largest there is, each row is summed in one
        # product, and what is summed over pieces, in fp32, is of the size of the hidden states.
        of_hidden_TH = of_weight_VH = None
        if wants_hidden:
            of_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        if wants_weight:
            of_weight_VH = torch.empty_like(weight_VH) if tokens else torch.zeros_like(weight_VH)
        for at in _pieces(words, tokens, ctx.piece) if tokens else ():
            weight_CH = weight_VH[at]
            logits_TC = hidden_TH @ weight_CH.t()
            chances_TC = _exponentials(logits_TC, scale_T)
            label_T = own_T - at.start
            is_label_T = is_own_T & (label_T >= 0) & (label_T < len(weight_CH))
            label_T = label_T.where(is_label_T, 0)
            chances_TC.scatter_add_(1, label_T[:, None], -is_label_T[:, None].float())
            of_logits_TC = torch.mul(chances_TC, gradient_T[:, None], out=logits_TC)
            if of_hidden_TH is not None:
                of_hidden_TH += of_logits_TC @ weight_CH
            if of_weight_VH is not None:
                torch.mm(of_logits_TC.t(), hidden_TH, out=of_weight_VH[at])
        if of_hidden_TH is not None:
            of_hidden_TH = of_hidden_TH.to(hidden_TH.dtype)
        return of_hidden_TH, of_weight_VH, None, None, None, None
