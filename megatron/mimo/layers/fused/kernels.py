# ruff: noqa: ANN001, ANN202 (what Triton compiles has no annotations but tl.constexpr)
"""Triton kernels of the fused operators; imported where one is launched.

Numbers are computed in fp32 and rounded once. Sizes that change from micro-batch to micro-batch are
not specialised: a kernel is compiled once for a model.

Legend: T tokens, H query heads, G key heads, D head size, R half of what turns of a head, W what is
projected for a key head, F features, E hidden, K parameters of a norm.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.mimo.layers.fused.launching import Launcher

__all__ = [
    "launch_activation",
    "launch_activation_backward",
    "launch_heads",
    "launch_heads_back",
    "launch_norm_backward",
    "launch_rotation",
]

_BLOCK = 1024  # features of a program
_HEADS = 8  # heads that a program turns at a time
_AT_A_TIME = 1 << 20  # features of the rows that programs of a norm have at a time: a GPU's full


@triton.jit
def _turn_heads(
    source, target, cos, sin, source_heads, source_share, target_heads, target_share, heads,
    SHARE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads of one token; of SHARE that follow each other there are strides between the first."""
    half = tl.arange(0, BLOCK_R)[None, :]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        at = source + (head // SHARE) * source_share + (head % SHARE) * source_heads
        to = target + (head // SHARE) * target_share + (head % SHARE) * target_heads
        here = (head < heads) & (half < R)
        first = tl.load(at + half, mask=here).to(tl.float32)
        second = tl.load(at + half + R, mask=here).to(tl.float32)
        tl.store(to + half, first * cos - second * sin, mask=here)
        tl.store(to + half + R, second * cos + first * sin, mask=here)
        if D > 2 * R:
            rest = 2 * R + tl.arange(0, BLOCK_D)[None, :]
            kept = (head < heads) & (rest < D)
            tl.store(to + rest, tl.load(at + rest, mask=kept), mask=kept)


@triton.jit
def _copy_heads(
    source, target, source_heads, target_heads, heads,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, BLOCK)[None, :]
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[:, None]
        here = (head < heads) & (feature < D)
        value = tl.load(source + head * source_heads + feature, mask=here)
        tl.store(target + head * target_heads + feature, value, mask=here)


@triton.jit
def _turns_of(turns, token, share, stride, scale, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Cosines and sines of a token, each of ``share`` tokens that follow each other, times."""
    half = tl.arange(0, BLOCK_R)[None, :]
    row = turns + (token // share) * stride + half
    return tl.load(row, mask=half < R) * scale, tl.load(row + R, mask=half < R) * scale


@triton.jit(do_not_specialize=["share"])
def _rotation(
    q, k, q_out, k_out, turns, share, scale, sign,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, turn_stride,
    H, G, D: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _turns_of(turns, token, share, turn_stride, scale, R, BLOCK_R)
    sin *= sign
    _turn_heads(
        q + token * q_stride_t, q_out + token * H * D, cos, sin, 0, q_stride_h, 0, D, H, 1, D, R,
        BLOCK_H, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    _turn_heads(
        k + token * k_stride_t, k_out + token * G * D, cos, sin, 0, k_stride_h, 0, D, G, 1, D, R,
        BLOCK_H, BLOCK_R, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["share"])
def _mixed_heads(
    mixed, q, k, v, turns, share, scale, turn_stride,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    G, SHARE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _turns_of(turns, token, share, turn_stride, scale, R, BLOCK_R)
    W: tl.constexpr = (SHARE + 2) * D
    mixed += token * G * W
    q += token * q_stride_t
    k += token * k_stride_t
    v += token * v_stride_t
    if BACK:
        _turn_heads(
            q, mixed, cos, -sin, q_stride_h, SHARE * q_stride_h, D, W, G * SHARE, SHARE, D, R,
            BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        _turn_heads(
            k, mixed + SHARE * D, cos, -sin, 0, k_stride_h, 0, W, G, 1, D, R,
            BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        _copy_heads(v, mixed + (SHARE + 1) * D, v_stride_h, W, G, D, BLOCK_H, BLOCK)
    else:
        _turn_heads(
            mixed, q, cos, sin, D, W, q_stride_h, SHARE * q_stride_h, G * SHARE, SHARE, D, R,
            BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        _turn_heads(
            mixed + SHARE * D, k, cos, sin, 0, W, 0, k_stride_h, G, 1, D, R,
            BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        _copy_heads(mixed + (SHARE + 1) * D, v, W, v_stride_h, G, D, BLOCK_H, BLOCK)


def launch_rotation(
    q_THD: Tensor, k_TGD: Tensor, turns_NR: Tensor, scale: float, back: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`megatron.mimo.layers.fused.rotation.rotate`; ``back`` turns the other way."""
    T, H, D = q_THD.shape
    G, half = k_TGD.size(1), turns_NR.size(1) // 2
    q_out, k_out = q_THD.new_empty((T, H, D)), k_TGD.new_empty((T, G, D))
    if T:
        strides = q_THD.stride()[:2] + k_TGD.stride()[:2]
        _ROTATION(
            (T, 1, 1),
            (q_THD, k_TGD, q_out, k_out, turns_NR),
            (T // len(turns_NR), float(scale), -1.0 if back else 1.0),
            (*strides, turns_NR.stride(0), H, G, D, half, *_blocks_of_a_head(D, half)[:3]),
        )
    return q_out, k_out


def launch_heads(
    mixed: Tensor, turns_NR: Tensor, scale: float, D: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`megatron.mimo.layers.fused.rotation.turn_heads`."""
    *rows, G, W = mixed.shape
    H = G * (W // D - 2)
    q, k, v = (mixed.new_empty((*rows, heads, D)) for heads in (H, G, G))
    strides = (H * D, D, G * D, D, G * D, D)
    _launch_mixed(mixed.contiguous(), (q, k, v), strides, turns_NR, scale, False)
    return q, k, v


def launch_heads_back(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, turns_NR: Tensor, scale: float
) -> Tensor:
    """See :func:`megatron.mimo.layers.fused.rotation.turn_heads_back`."""
    T, G, D = k_TGD.shape
    mixed_TGW = k_TGD.new_empty((T, G, (q_THD.size(1) // G + 2) * D))
    heads = q_THD, k_TGD, v_TGD
    strides = tuple(stride for one in heads for stride in one.stride()[:2])
    _launch_mixed(mixed_TGW, heads, strides, turns_NR, scale, True)
    return mixed_TGW


def _launch_mixed(
    mixed: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    turns_NR: Tensor,
    scale: float,
    back: bool,
) -> None:
    G, W = mixed.shape[-2:]
    D, (N, turned) = heads[0].size(-1), turns_NR.shape
    T = mixed.numel() // (G * W)
    if T:
        sizes = (G, W // D - 2, D, turned // 2, back, *_blocks_of_a_head(D, turned // 2))
        _MIXED_HEADS(
            (T, 1, 1),
            (mixed, *heads, turns_NR),
            (T // N, float(scale)),
            (turns_NR.stride(0), *strides, *sizes),
        )


@cache
def _blocks_of_a_head(D: int, half: int) -> tuple[int, int, int, int]:
    """Heads of a block, and features: of half of what turns, of what does not, and of all."""
    power = triton.next_power_of_2
    return _HEADS, power(half), power(max(D - 2 * half, 1)), power(D)


_ROTATION, _MIXED_HEADS = Launcher(_rotation), Launcher(_mixed_heads)


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
    out_TF = inner_TF.new_empty((T, F))
    if T:
        fixed = (F, kind, gated, _BLOCK)
        _ACTIVATION((T, -(-F // _BLOCK), 1), (inner_TF.contiguous(), out_TF), (), fixed)
    return out_TF


def launch_activation_backward(grad_TF: Tensor, inner_TF: Tensor, kind: int, gated: bool) -> Tensor:
    """The gradient of ``inner_TF``."""
    inner_TF = inner_TF.contiguous()
    out = torch.empty_like(inner_TF)
    T, F = grad_TF.shape
    if T:
        tensors = (grad_TF.contiguous(), inner_TF, out)
        fixed = (F, kind, gated, _BLOCK)
        _ACTIVATION_BACKWARD((T, -(-F // _BLOCK), 1), tensors, (), fixed)
    return out


_ACTIVATION, _ACTIVATION_BACKWARD = Launcher(_activation), Launcher(_activation_backward)


@triton.jit(do_not_specialize=["T"])
def _norm_backward(
    of_normed, of_total, total, weight, mean, rstd, out, sums, T, base,
    E: tl.constexpr, RMS: tl.constexpr, ADDS: tl.constexpr, WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of one program, and their sums for the weight's gradient and the bias's."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    feature = tl.arange(0, BLOCK)
    here = feature < E
    scale = tl.load(weight + feature, mask=here, other=0.0).to(tl.float32) + base
    of_weight = tl.zeros([BLOCK], dtype=tl.float32)
    of_bias = tl.zeros([BLOCK], dtype=tl.float32)
    start = program.to(tl.int64) * E
    step = programs.to(tl.int64) * E
    for row in range(program, T, programs):
        even = tl.load(total + start + feature, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(of_normed + start + feature, mask=here, other=0.0).to(tl.float32)
        factor = tl.load(rstd + row)
        if not RMS:
            even -= tl.load(mean + row)
        even *= factor  # beyond the row it may be anything: there the gradient is zero
        if WANTED > 0:
            of_weight += grad * even
        if WANTED > 1:
            of_bias += grad
        grad *= scale
        found = grad - even * (tl.sum(grad * even, axis=0) / E)
        if not RMS:
            found -= tl.sum(grad, axis=0) / E
        found *= factor
        if ADDS:
            found += tl.load(of_total + start + feature, mask=here, other=0.0).to(tl.float32)
        tl.store(out + start + feature, found, mask=here)
        start += step
    at = sums + program * WANTED * E + feature
    if WANTED > 0:
        tl.store(at, of_weight, mask=here)
    if WANTED > 1:
        tl.store(at + E, of_bias, mask=here)


def launch_norm_backward(
    of_normed_TE: Tensor,
    of_total_TE: Tensor | None,
    total_TE: Tensor,
    weight: Tensor,
    mean_T1: Tensor | None,
    rstd_T1: Tensor,
    zero_centered: bool,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of what is normed, and [K, E] of the norm's ``wanted`` parameters."""
    T, E = total_TE.shape
    block = triton.next_power_of_2(E)
    programs = min(T, max(_AT_A_TIME // block, 1), 1024)
    of_normed_TE = of_normed_TE.contiguous()
    out_TE = torch.empty((T, E), dtype=total_TE.dtype, device=total_TE.device)
    sums = torch.empty((programs, wanted, E), dtype=torch.float32, device=total_TE.device)
    if T:
        _NORM_BACKWARD(
            (programs, 1, 1),
            (
                of_normed_TE,
                of_normed_TE if of_total_TE is None else of_total_TE.contiguous(),
                total_TE.contiguous(),
                weight,
                rstd_T1 if mean_T1 is None else mean_T1,
                rstd_T1,
                out_TE,
                sums,
            ),
            (T, float(zero_centered)),
            (E, mean_T1 is None, of_total_TE is not None, wanted, block),
            num_warps=min(max(block // 256, 1), 16),
        )
    return out_TE, sums.sum(0).to(weight.dtype)


_NORM_BACKWARD = Launcher(_norm_backward)
