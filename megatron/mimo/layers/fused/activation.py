"""The activation of a feed-forward with its gate: one launch forward and one backward.

Legend: T tokens, F features, 2 F where there is a gate: first what is activated, then the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.mimo.layers.fused.operators import apply_of, define, launched

__all__ = ["KINDS", "activate"]

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu")
_QUICK = 1.702


def activate(inner_TF: Tensor, kind: str, *, gated: bool) -> Tensor:
    """``act(x)``, or ``act(x1) * x2`` with a gate; computed in fp32 at least.

    Args:
        inner_TF: [T, F], or [T, 2 F] with a gate.
        kind: one of :data:`KINDS`.
        gated: whether there is a gate.
    """
    out: Tensor = _activate(inner_TF, KINDS.index(kind), gated)
    return out


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
        ctx.save_for_backward(inner_TF)
        ctx.kind, ctx.gated = kind, gated
        out_TF: Tensor = _forward(inner_TF, kind, gated)
        return out_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inner_TF,) = ctx.saved_tensors
        return _backward(grads[0], inner_TF, ctx.kind, ctx.gated), None, None


_activate = apply_of(_Activate)


def _act(x: Tensor, kind: int) -> Tensor:
    if KINDS[kind] == "silu":
        return F.silu(x)
    if KINDS[kind] == "quick_gelu":
        return x * torch.sigmoid(_QUICK * x)
    return F.gelu(x, approximate="tanh" if KINDS[kind] == "gelu_tanh" else "none")


def _act_backward(grad: Tensor, x: Tensor, kind: int) -> Tensor:
    result: Tensor
    if KINDS[kind] == "silu":
        result = torch.ops.aten.silu_backward(grad, x)
    elif KINDS[kind] == "quick_gelu":
        share = torch.sigmoid(_QUICK * x)
        result = grad * share * (1 + _QUICK * x * (1 - share))
    else:
        approximate = "tanh" if KINDS[kind] == "gelu_tanh" else "none"
        result = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _plain_forward(inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
    wide_TF = _wide(inner_TF)
    if not gated:
        return _act(wide_TF, kind).to(inner_TF.dtype)
    first_TF, gate_TF = wide_TF.chunk(2, dim=-1)
    return (_act(first_TF, kind) * gate_TF).to(inner_TF.dtype)


def _plain_backward(grad_TF: Tensor, inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
    wide_TF, grad_wide_TF = _wide(inner_TF), _wide(grad_TF)
    if not gated:
        return _act_backward(grad_wide_TF, wide_TF, kind).to(inner_TF.dtype)
    first_TF, gate_TF = wide_TF.chunk(2, dim=-1)
    parts = (
        _act_backward(grad_wide_TF * gate_TF, first_TF, kind),
        grad_wide_TF * _act(first_TF, kind),
    )
    return torch.cat(parts, dim=-1).to(inner_TF.dtype)


def _empty_forward(inner_TF: Tensor, kind: int, gated: bool) -> Tensor:  # noqa: ARG001
    rows, width = inner_TF.shape
    return inner_TF.new_empty((rows, width // 2 if gated else width))


def _empty_backward(grad_TF: Tensor, inner_TF: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return inner_TF.new_empty(inner_TF.shape)


_forward = define(
    "activate(Tensor inner, int kind, bool gated) -> Tensor",
    plain=_plain_forward,
    kernel=launched("launch_activation"),
    empty=_empty_forward,
)
_backward = define(
    "activate_backward(Tensor grad, Tensor inner, int kind, bool gated) -> Tensor",
    plain=_plain_backward,
    kernel=launched("launch_activation_backward"),
    empty=_empty_backward,
)
