# ruff: noqa: ANN001, ANN202 (what Triton compiles has no annotations but tl.constexpr)
"""Triton kernels of the cross-entropy; imported where one is launched.

Numbers are computed in fp32. A kernel is compiled once for a dtype, and once more where rows are of
a width whose blocks are not aligned.

Legend: C rows, V words in a row, padding included, B words of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_gradient", "launch_sums"]

_BLOCK = 4096
_WARPS = 8
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["first", "words", "stride"])
def _sums(logits, labels, sums, first, words, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row) - first
    logits += row * V
    # The largest so far, of a row; the sum of exponentials, of every place in a block.
    largest = _LEAST
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, words, BLOCK):
        word_B = start + tl.arange(0, BLOCK)
        # Of V it is known that whole vectors lie before it, of the number of words it is not.
        logit_B = tl.load(logits + word_B, mask=word_B < V, other=0.0).to(tl.float32)
        logit_B = tl.where(word_B < words, logit_B, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(logit_B, axis=0))
        sum_B = sum_B * tl.exp(before - largest) + tl.exp(logit_B - largest)
    is_own = (label >= 0) & (label < words)
    of_label = tl.load(logits + label, mask=is_own, other=0.0).to(tl.float32)
    tl.store(sums + row, tl.log(tl.sum(sum_B, axis=0)) + largest)
    tl.store(sums + stride + row, of_label)


@triton.jit(do_not_specialize=["first", "words"])
def _gradient(logits, labels, scale, grad, first, words, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_B = logits + row * V + word_B
    logit_B = tl.load(at_B, mask=word_B < V, other=0.0).to(tl.float32)
    label = (tl.load(labels + row) - first).to(tl.int32)
    chance_B = tl.exp(logit_B - tl.load(scale + row))
    of_logit_B = tl.where(word_B == label, chance_B - 1, chance_B) * tl.load(grad + row)
    tl.store(at_B, tl.where(word_B < words, of_logit_B, 0.0), mask=word_B < V)


def launch_sums(
    logits_CV: Tensor, labels_C: Tensor, first: int, words: int, sums_2C: Tensor
) -> None:
    """See :data:`megatron.mimo.layers.fused.cross_entropy.sums_of_logits`."""
    C, V = logits_CV.shape
    if C:
        with torch.cuda.device_of(logits_CV):
            _sums[(C,)](
                logits_CV, labels_C.contiguous(), sums_2C, first, words, sums_2C.stride(0), V,
                _BLOCK, num_warps=_WARPS,
            )  # fmt: skip


def launch_gradient(
    logits_CV: Tensor, labels_C: Tensor, first: int, words: int, scale_C: Tensor, grad_C: Tensor
) -> None:
    """See :data:`megatron.mimo.layers.fused.cross_entropy.gradient_of_logits_`."""
    C, V = logits_CV.shape
    if C and V:
        with torch.cuda.device_of(logits_CV):
            _gradient[(C, triton.cdiv(V, _BLOCK))](
                logits_CV, labels_C.contiguous(), scale_C, grad_C.contiguous(), first, words, V,
                _BLOCK, num_warps=_WARPS,
            )  # fmt: skip
