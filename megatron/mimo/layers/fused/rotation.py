"""Rotation of queries and keys by their positions: one launch for both, forward and backward.

Legend: T tokens, H query heads, G key heads, D head size, R half of what turns of a head, N rows of
turns, W what is projected for a key head: its queries, the key and the value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.mimo.layers.fused.operators import apply_of, define, launched

__all__ = ["rotate", "turn_heads"]


def rotate(
    q_THD: Tensor, k_TGD: Tensor, turns_NR: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn feature i and feature i + R of each head by an angle, in fp32 at least.

    Args:
        q_THD: queries, [T, H, D] or [S, B, H, D], where T = S * B counts samples fastest.
        k_TGD: keys, likewise.
        turns_NR: fp32 [N, 2 R]: cosines, then sines; contiguous but for the rows' stride. T is a
            multiple of N: a row is of T / N tokens that follow each other. Features from 2 R on
            stay as they are.
        scale: of cosines and sines.

    Returns:
        Queries and keys, contiguous, in their shapes and dtypes.
    """
    return _rotate_both(q_THD, k_TGD, turns_NR, scale)


def turn_heads(
    mixed_TGW: Tensor, turns_NR: Tensor, head_size: int, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, G, D], turned as :func:`rotate` does, and values [T, G, D].

    Args:
        mixed_TGW: as they are projected, contiguous; or [S, B, G, W], and so are the others.
        turns_NR: see :func:`rotate`.
        head_size: D.
        scale: of cosines and sines.
    """
    return _turn_heads(mixed_TGW, turns_NR, head_size, scale)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, turns_NR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(turns_NR)
        ctx.scale = scale
        q, k = _rotate(_rows(q_THD), _rows(k_TGD), turns_NR, scale, False)
        return q.view(q_THD.shape), k.view(k_TGD.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (turns_NR,) = ctx.saved_tensors
        dq, dk = _rotate(_rows(grads[0]), _rows(grads[1]), turns_NR, ctx.scale, True)
        return dq.view(grads[0].shape), dk.view(grads[1].shape), None, None


_rotate_both = apply_of(_Rotate)


class _TurnHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, turns_NR: Tensor, head_size: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns_NR)
        ctx.shape, ctx.scale = mixed.shape, scale
        found: tuple[Tensor, Tensor, Tensor] = _heads(mixed, turns_NR, scale, head_size)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (turns_NR,) = ctx.saved_tensors
        of_mixed = _heads_back(*(_rows(one) for one in grads), turns_NR, ctx.scale)
        return of_mixed.view(ctx.shape), None, None, None


_turn_heads = apply_of(_TurnHeads)


def _rows(heads: Tensor) -> Tensor:
    """[T, heads, D] whose last two axes are contiguous up to the stride of heads."""
    if heads.dim() == 4:
        heads = heads.flatten(0, 1)
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _plain(
    q_THD: Tensor, k_TGD: Tensor, turns_NR: Tensor, scale: float, back: bool
) -> tuple[Tensor, Tensor]:
    half = turns_NR.size(1) // 2
    share = len(q_THD) // len(turns_NR)
    turns_TR = turns_NR.repeat_interleave(share, 0) if share > 1 else turns_NR
    wide = torch.promote_types(q_THD.dtype, turns_NR.dtype)
    cos_T1R, sin_T1R = (
        one[:, None].to(wide) * scale if scale != 1 else one[:, None].to(wide)
        for one in (turns_TR[:, :half], turns_TR[:, half:])
    )
    sin_T1R = -sin_T1R if back else sin_T1R

    def turned(heads: Tensor) -> Tensor:
        first, second = heads[..., :half].to(wide), heads[..., half : 2 * half].to(wide)
        parts = [first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R]
        if heads.size(-1) > 2 * half:
            parts.append(heads[..., 2 * half :].to(wide))
        return torch.cat(parts, dim=-1).to(heads.dtype)

    return turned(q_THD), turned(k_TGD)


def _plain_heads(
    mixed: Tensor, turns_NR: Tensor, scale: float, D: int
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, G, W = mixed.shape
    q, k, v = mixed.view(-1, G, W).split((W - 2 * D, D, D), dim=-1)
    q, k = _plain(q.reshape(len(q), -1, D), k, turns_NR, scale, False)
    q, k, v = (one.reshape(*rows, -1, D) for one in (q, k, v))
    return q, k, v.contiguous()


def _plain_heads_back(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, turns_NR: Tensor, scale: float
) -> Tensor:
    q, k = _plain(q_THD, k_TGD, turns_NR, scale, True)
    return torch.cat([q.view(*k.shape[:2], -1), k, v_TGD], dim=-1)


def _empty_heads(
    mixed: Tensor,
    turns_NR: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    D: int,
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, G, W = mixed.shape
    q, k, v = (mixed.new_empty((*rows, heads, D)) for heads in (G * (W // D - 2), G, G))
    return q, k, v


def _empty_heads_back(q_THD: Tensor, k_TGD: Tensor, *_: Any) -> Tensor:
    T, G, D = k_TGD.shape
    return k_TGD.new_empty((T, G, (q_THD.size(1) // G + 2) * D))


def _empty(q_THD: Tensor, k_TGD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THD.new_empty(q_THD.shape), k_TGD.new_empty(k_TGD.shape)


_rotate = define(
    "rotate(Tensor q, Tensor k, Tensor turns, float scale, bool back) -> (Tensor, Tensor)",
    plain=_plain,
    kernel=launched("launch_rotation"),
    empty=_empty,
)
_heads = define(
    "turn_heads(Tensor mixed, Tensor turns, float scale, int size) -> (Tensor, Tensor, Tensor)",
    plain=_plain_heads,
    kernel=launched("launch_heads"),
    empty=_empty_heads,
)
_heads_back = define(
    "turn_heads_back(Tensor q, Tensor k, Tensor v, Tensor turns, float scale) -> Tensor",
    plain=_plain_heads_back,
    kernel=launched("launch_heads_back"),
    empty=_empty_heads_back,
)
