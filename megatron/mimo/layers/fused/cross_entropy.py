"""Cross-entropy of logits as a product of matrices leaves them: each pass over them is one launch.

Legend: C tokens of a piece of the logits, V their words, the last of which may be padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.mimo.layers.fused.operators import define, launched

__all__ = ["gradient_of_logits_", "sums_of_logits"]

_BLOCK = 2**20  # logits at a time, where their exponentials are made by a pass of their own


def _plain(logits_CV: Tensor, labels_C: Tensor, first: int, words: int, sums_2C: Tensor) -> None:
    sums_2C[0], sums_2C[1] = -torch.inf, 0
    if not words:
        return
    own_C, is_own_C = _own_labels(labels_C, first, words)
    of_label_C = logits_CV.gather(1, own_C[:, None])[:, 0]
    sums_2C[1] = of_label_C.where(is_own_C, 0)
    for at in _blocks(logits_CV):
        of_words_CV = logits_CV[at, :words]
        largest_C = of_words_CV.amax(dim=1).to(sums_2C.dtype)
        exponentials_CV = torch.sub(of_words_CV, largest_C[:, None]).exp_()
        sums_2C[0, at] = exponentials_CV.sum(dim=1).log_() + largest_C


def _plain_backward(
    logits_CV: Tensor, labels_C: Tensor, first: int, words: int, scale_C: Tensor, grad_C: Tensor
) -> None:
    logits_CV[:, words:] = 0
    if not words:
        return
    own_C, is_own_C = _own_labels(labels_C, first, words)
    minus_C = -is_own_C.to(scale_C.dtype)
    for at in _blocks(logits_CV):
        of_words_CV = logits_CV[at, :words]
        chances_CV = torch.sub(of_words_CV, scale_C[at, None]).exp_()
        chances_CV.scatter_add_(1, own_C[at, None], minus_C[at, None])
        torch.mul(chances_CV, grad_C[at, None], out=of_words_CV)


def _own_labels(labels_C: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """The column of each label, 0 where it is none of these, and whether it is one of them."""
    own_C = labels_C - first
    is_own_C = (own_C >= 0) & (own_C < words)
    return own_C.where(is_own_C, 0), is_own_C


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows whose exponentials stay in a processor's cache, and take little memory."""
    rows = max(_BLOCK // logits_CV.size(1), 1)
    return (slice(start, start + rows) for start in range(0, len(logits_CV), rows))


def _empty(*_: Any) -> None:
    """What is written has no values."""


sums_of_logits = define(
    "sums_of_logits(Tensor logits, Tensor labels, int first, int words, Tensor(a!) sums) -> ()",
    plain=_plain,
    kernel=launched("launch_sums", "cross_entropy_kernels"),
    empty=_empty,
)
"""Write, of each row of logits, the logarithm of the sum of their exponentials and the label's own.

Arguments:
    logits: [C, V], contiguous.
    labels: int64 [C], token ids.
    first: token of the first column.
    words: columns that are words, 0 to V; the rest is padding, which takes no part.
    sums: [2, C], fp32 at least; 0 for a label that is not among the words.
"""

gradient_of_logits_ = define(
    "gradient_of_logits_(Tensor(a!) logits, Tensor labels, int first, int words, Tensor scale, "
    "Tensor grad) -> ()",
    plain=_plain_backward,
    kernel=launched("launch_gradient", "cross_entropy_kernels"),
    empty=_empty,
)
"""Put the gradient of logits in their place: (exp(logit - scale) - is_label) * grad, 0 of padding.

Arguments:
    logits, labels, first, words: as above.
    scale: [C], what the logarithm of the sum of exponentials is of all words of all ranks.
    grad: [C], of each token's loss.
"""
