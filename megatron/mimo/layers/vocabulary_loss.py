"""Cross-entropy over a vocabulary, piece by piece: the logits are never there all at once.

A sequence of 8,192 tokens over 150,000 words has logits of 4.9 GB in fp32, and the plain loss holds
several tensors of this size. Here tokens are taken a few hundred at a time. What is kept for the
backward pass is one number per token; there the logits are computed a second time, a few thousand
words at a time. Where all logits are one piece it is kept, and computed once: the backward pass of
a loss comes right after it, and needs as much memory again.

Legend: T tokens, H hidden, V this rank's part of the vocabulary, C tokens or words of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mimo.layers.fused.cross_entropy import gradient_of_logits_, sums_of_logits

__all__ = ["PIECE", "chunked_cross_entropy"]

PIECE = 256 * 2**20
"""Bytes of the logits of a piece."""

_ALIGNED = 64  # products of half precision are slow on a GPU where a size is no multiple of 8


def chunked_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    first: int,
    group: dist.ProcessGroup,
    words: int | None = None,
    piece: int = PIECE,
) -> Tensor:
    """The loss of each token, fp32 [T]; its gradients reach ``hidden_TH`` and ``weight_VH``.

    Collective over ``group``: two reductions of [T] numbers forward, none backward; the gradient
    of ``hidden_TH`` is this rank's part of a sum.

    Args:
        hidden_TH: what the output layer is given, the same on all ranks of the group.
        weight_VH: this rank's rows of the output layer; V may be 0.
        labels_T: int64 token ids; all are in some rank's part.
        first: token of this rank's first row.
        group: the ranks that the vocabulary is divided over.
        words: rows that are words, 0 to V; those behind them are padding, without probability and
            gradient. None for all.
        piece: bytes that the logits of a piece may take, in the dtype of ``hidden_TH``.
    """
    words = len(weight_VH) if words is None else words
    losses_T: Tensor = _ChunkedCrossEntropy.apply(
        hidden_TH, weight_VH, labels_T, first, words, group, piece
    )
    return losses_T


def _pieces(rows: int, width: int, piece: int) -> list[slice]:
    """Rows of ``width`` bytes, so many at a time that they take ``piece`` bytes."""
    step = max(piece // max(width, 1), 1)
    step -= step % _ALIGNED if _ALIGNED < step < rows else 0
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _add_product(sum_TH: Tensor, left_TC: Tensor, right_CH: Tensor) -> None:
    """Add a product of matrices, half precision to fp32 included."""
    if left_TC.dtype == sum_TH.dtype:
        torch.addmm(sum_TH, left_TC, right_CH, out=sum_TH)  # FLOP counters know no addmm_
    elif left_TC.is_cuda:
        # addmm could do it at once; torch 2.11's FLOP counter fails at one of two dtypes.
        sum_TH += torch.mm(left_TC, right_CH, out_dtype=sum_TH.dtype)
    else:
        sum_TH += left_TC @ right_CH


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        first: int,
        words: int,
        group: dist.ProcessGroup,
        piece: int,
    ) -> Tensor:
        tokens, rows = len(hidden_TH), len(weight_VH)
        pieces = _pieces(tokens, rows * hidden_TH.element_size(), piece)
        # Of each token the logarithm of the sum of exponentials, and the label's logit.
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        sums_2T = hidden_TH.new_empty((2, tokens), dtype=wide)
        place_CV = hidden_TH.new_empty((pieces[0].stop if pieces else 0, rows))
        for at in pieces:
            logits_CV = place_CV[: at.stop - at.start]
            torch.mm(hidden_TH[at], weight_VH.t(), out=logits_CV)
            sums_of_logits(logits_CV, labels_T[at], first, words, sums_2T[:, at])
        if group.size() > 1:
            largest_T = sums_2T[0].clone()
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
            sums_2T[0].sub_(largest_T).exp_()
            dist.all_reduce(sums_2T, group=group)
            sums_2T[0].log_().add_(largest_T)
        scale_T, of_label_T = sums_2T
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, scale_T)
        ctx.first, ctx.words, ctx.piece = first, words, piece
        ctx.logits_TV = place_CV if len(pieces) == 1 else None
        return scale_T - of_label_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Any, ...]:
        hidden_TH, weight_VH, labels_T, scale_T = ctx.saved_tensors
        tokens, rows = len(hidden_TH), len(weight_VH)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # Kept logits become their gradient; a second backward pass computes them again.
        kept_TV, ctx.logits_TV = ctx.logits_TV, None
        # Pieces are of the vocabulary: of a weight, the largest there is, each row is summed in one
        # product, and what is summed over pieces, in fp32, is of the size of the hidden states.
        pieces = [slice(0, rows)]
        if kept_TV is None:
            pieces = _pieces(rows, tokens * hidden_TH.element_size(), ctx.piece)
            place = hidden_TH.new_empty(tokens * (pieces[0].stop if pieces else 0))
        of_hidden_TH = of_weight_VH = None
        if wants_hidden and len(pieces) != 1:
            of_hidden_TH = torch.zeros_like(hidden_TH, dtype=scale_T.dtype)
        if wants_weight:
            of_weight_VH = torch.empty_like(weight_VH)
        for at in pieces:
            weight_CH, logits_TC = weight_VH[at], kept_TV
            if logits_TC is None:
                logits_TC = place[: tokens * len(weight_CH)].view(tokens, len(weight_CH))
                torch.mm(hidden_TH, weight_CH.t(), out=logits_TC)
            words = min(max(ctx.words - at.start, 0), len(weight_CH))
            gradient_of_logits_(
                logits_TC, labels_T, ctx.first + at.start, words, scale_T, gradient_T
            )
            if of_hidden_TH is not None:
                _add_product(of_hidden_TH, logits_TC, weight_CH)
            elif wants_hidden:
                of_hidden_TH = logits_TC @ weight_CH
            if of_weight_VH is not None:
                torch.mm(logits_TC.t(), hidden_TH, out=of_weight_VH[at])
        if of_hidden_TH is not None:
            of_hidden_TH = of_hidden_TH.to(hidden_TH.dtype)
        return of_hidden_TH, of_weight_VH, None, None, None, None, None
