# ruff: noqa: ANN001, ANN202 (what Triton compiles has no annotations but tl.constexpr)
"""Triton kernels of the fused operators; imported where one is launched.

Numbers are computed in fp32 and rounded once. Sizes that change from micro-batch to micro-batch are
not specialised: a kernel is compiled once for a model.

Legend: T tokens, H query heads, G key heads, D head size, R half of what turns of a head, F
features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "launch_activation",
    "launch_activation_backward",
    "launch_rotation",
]

_BLOCK = 1024  # features of a program
_HEADS = 8  # heads that a program turns at a time


@triton.jit
def _turn_heads(
    source, target, cos, sin, token, stride_t, stride_h,
    heads, D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, BLOCK_R)[None, :]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        here = (head < heads) & (half < R)
        at = source + token * stride_t + head * stride_h + half
        to = target + (token * heads + head) * D + half
        first = tl.load(at, mask=here).to(tl.float32)
        second = tl.load(at + R, mask=here).to(tl.float32)
        tl.store(to, first * cos - second * sin, mask=here)
        tl.store(to + R, second * cos + first * sin, mask=here)
        if D > 2 * R:
            rest = 2 * R + tl.arange(0, BLOCK_D)[None, :]
            kept = (head < heads) & (rest < D)
            value = tl.load(source + token * stride_t + head * stride_h + rest, mask=kept)
            tl.store(target + (token * heads + head) * D + rest, value, mask=kept)


@triton.jit(do_not_specialize=["share"])
def _rotation(
    q, k, q_out, k_out, turns, q_stride_t, q_stride_h, k_stride_t, k_stride_h, turn_stride,
    share, scale, sign,
    H, G, D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_R)[None, :]
    row = turns + (token // share) * turn_stride + half
    cos = tl.load(row, mask=half < R) * scale
    sin = tl.load(row + R, mask=half < R) * (scale * sign)
    _turn_heads(
        q, q_out, cos, sin, token, q_stride_t, q_stride_h, H, D, R, BLOCK_H, BLOCK_R, BLOCK_D
    )
    _turn_heads(
        k, k_out, cos, sin, token, k_stride_t, k_stride_h, G, D, R, BLOCK_H, BLOCK_R, BLOCK_D
    )


def launch_rotation(
    q_THD: Tensor, k_TGD: Tensor, turns_NR: Tensor, scale: float, back: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`megatron.mimo.layers.fused.rotation.rotate`; ``back`` turns the other way."""
    T, H, D = q_THD.shape
    G, half = k_TGD.size(1), turns_NR.size(1) // 2
    q_out, k_out = (
        torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q_THD, k_TGD)
    )
    if T == 0:
        return q_out, k_out
    _rotation[(T,)](
        q_THD, k_TGD, q_out, k_out, turns_NR,
        q_THD.stride(0), q_THD.stride(1), k_TGD.stride(0), k_TGD.stride(1), turns_NR.stride(0),
        T // len(turns_NR), scale, -1.0 if back else 1.0,
        H, G, D, half, _HEADS, triton.next_power_of_2(half),
        triton.next_power_of_2(max(D - 2 * half, 1)),
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """The activation at x, and its derivative."""
    if KIND == 0:  # silu
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1 + x * (1 - share))
    elif KIND == 1:  # gelu
        share = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == 2:  # gelu_tanh: (1 + tanh(z)) / 2 = sigmoid(2 z)
        share = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value = x * share
        slope = share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:  # quick_gelu
        share = tl.sigmoid(1.702 * x)
        value = x * share
        slope = share * (1 + 1.702 * x * (1 - share))
    return value, slope


@triton.jit
def _activation(
    inner, out, F, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = feature < F
    width = 2 * F if GATED else F
    at = inner + token * width + feature
    value, _ = _activated(tl.load(at, mask=here).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(at + F, mask=here).to(tl.float32)
    tl.store(out + token * F + feature, value, mask=here)


@triton.jit
def _activation_backward(
    grad, inner, out, F, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = feature < F
    width = 2 * F if GATED else F
    at = token * width + feature
    value, slope = _activated(tl.load(inner + at, mask=here).to(tl.float32), KIND)
    given = tl.load(grad + token * F + feature, mask=here).to(tl.float32)
    if GATED:
        gate = tl.load(inner + at + F, mask=here).to(tl.float32)
        tl.store(out + at + F, given * value, mask=here)
        given *= gate
    tl.store(out + at, given * slope, mask=here)


def launch_activation(inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
    """See :func:`megatron.mimo.layers.fused.activation.activate`."""
    T, width = inner_TF.shape
    F = width // 2 if gated else width
    out_TF = torch.empty((T, F), dtype=inner_TF.dtype, device=inner_TF.device)
    if T:
        grid = (T, triton.cdiv(F, _BLOCK))
        _activation[grid](inner_TF.contiguous(), out_TF, F, kind, gated, _BLOCK)
    return out_TF


def launch_activation_backward(grad_TF: Tensor, inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
    """The gradient of ``inner_TF``."""
    inner_TF = inner_TF.contiguous()
    out = torch.empty_like(inner_TF)
    T, F = grad_TF.shape
    if T:
        grid = (T, triton.cdiv(F, _BLOCK))
        _activation_backward[grid](grad_TF.contiguous(), inner_TF, out, F, kind, gated, _BLOCK)
    return out
