"""A residual and the norm of it, whose gradient is made in one pass over the rows.

Forward it is torch's own addition and norm, without a graph. Backward, torch's norms read their
rows twice, once for the rows and once for the weight, and a third pass adds the gradient that the
residual has besides; here one launch does all three.

Legend: T tokens, E hidden, K parameters whose gradients are wanted: none, weight, weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mimo.layers.fused.operators import apply_of, define, launched
from megatron.mimo.layers.norm import Kind, widened

__all__ = ["add_norm"]

_WIDEST = 8192  # features of a row that a kernel holds in registers


def add_norm(
    residual: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor]:
    """``residual + added``, or the residual as it is, and the norm of that; both [T, E].

    Args:
        residual: [..., E], T rows.
        added: as many rows, in any shape; or None.
        weight: [E].
        bias: [E]; or None.
        kind: of the norm.
    """
    found: tuple[Tensor, Tensor] = _add_norm(residual, added, weight, bias, kind)
    return found


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        added: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        kind: Kind,
    ) -> tuple[Tensor, Tensor]:
        total = residual
        if added is not None:
            alike = residual.dim() == added.dim()
            total = (residual if alike else residual.reshape(added.shape)) + added
        total_TE = total if total.dim() == 2 else total.reshape(-1, total.size(-1))
        normed_TE, mean_T1, rstd_T1 = _normed(total_TE, weight, bias, kind)
        ctx.save_for_backward(total_TE, weight, mean_T1, rstd_T1)
        ctx.set_materialize_grads(False)
        shapes = residual.shape, None if added is None else added.shape
        ctx.given = *shapes, bias is not None, kind
        return total_TE, normed_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_total, of_normed = grads
        residual, added, has_bias, kind = ctx.given
        of_weight = of_bias = None
        if of_normed is not None:
            total_TE, weight, mean_T1, rstd_T1 = ctx.saved_tensors
            wanted = 1 + has_bias if any(ctx.needs_input_grad[2:4]) else 0
            given = of_normed, of_total, total_TE, weight, mean_T1, rstd_T1
            of_total, of_parameters_KE = _backward(*given, kind.zero_centered, wanted)
            of_weight, of_bias = (*of_parameters_KE.unbind(), None, None)[:2]
        assert of_total is not None
        of_total = of_total.reshape(residual)
        of_added = None
        if added is not None:
            of_added = of_total if added == residual else of_total.reshape(added)
        return of_total, of_added, of_weight, of_bias, None


_add_norm = apply_of(_AddNorm)


def _normed(
    total_TE: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm, and what it was made with: LayerNorm's mean, and the factor of a row."""
    if kind.zero_centered or total_TE.dtype != weight.dtype:
        wide = widened(total_TE, weight, bias, kind)
        normed_TE, mean_T1, rstd_T1 = _normed(*wide, Kind(kind.eps, kind.rms))
        return normed_TE.to(total_TE.dtype), mean_T1, rstd_T1
    if kind.rms:
        normed_TE, rstd_T1 = torch._fused_rms_norm(total_TE, weight.shape, weight, kind.eps)
        return normed_TE, None, rstd_T1
    return torch.native_layer_norm(total_TE, weight.shape, weight, bias, kind.eps)


def _plain_backward(
    of_normed_TE: Tensor,
    of_total_TE: Tensor | None,
    total_TE: Tensor,
    weight: Tensor,
    mean_T1: Tensor | None,
    rstd_T1: Tensor,
    zero_centered: bool,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(total_TE.dtype, torch.float32)
    even_TE = total_TE.to(wide)
    if mean_T1 is not None:
        even_TE = even_TE - mean_T1
    even_TE = even_TE * rstd_T1
    grad_TE = of_normed_TE.to(wide)
    of_parameters_KE = weight.new_empty((wanted, len(weight)), dtype=wide)
    for sums, terms in zip(of_parameters_KE, (grad_TE * even_TE, grad_TE), strict=False):
        torch.sum(terms, 0, out=sums)
    grad_TE = grad_TE * (weight.to(wide) + zero_centered)
    out_TE = grad_TE - even_TE * (grad_TE * even_TE).mean(-1, keepdim=True)
    if mean_T1 is not None:
        out_TE = out_TE - grad_TE.mean(-1, keepdim=True)
    out_TE = out_TE * rstd_T1
    if of_total_TE is not None:
        out_TE = out_TE + of_total_TE
    return out_TE.to(total_TE.dtype), of_parameters_KE.to(weight.dtype)


def _kernel_backward(
    of_normed_TE: Tensor,
    of_total_TE: Tensor | None,
    total_TE: Tensor,
    weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    compute = _plain_backward if len(weight) > _WIDEST else _launch_backward
    found: tuple[Tensor, Tensor] = compute(of_normed_TE, of_total_TE, total_TE, weight, *others)
    return found


def _empty_backward(
    of_normed_TE: Tensor,  # noqa: ARG001
    of_total_TE: Tensor | None,  # noqa: ARG001
    total_TE: Tensor,
    weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    wanted: int = others[-1]
    return total_TE.new_empty(total_TE.shape), weight.new_empty((wanted, len(weight)))


_launch_backward = launched("launch_norm_backward")
_backward = define(
    "norm_backward(Tensor of_normed, Tensor? of_total, Tensor total, Tensor weight, Tensor? mean, "
    "Tensor rstd, bool zero_centered, int wanted) -> (Tensor, Tensor)",
    plain=_plain_backward,
    kernel=_kernel_backward,
    empty=_empty_backward,
)
