"""The gated delta rule in chunks, in PyTorch: linear in length, forward and backward.

Each head keeps a matrix, its state, that maps keys to values. A token forgets a part of the state,
corrects what it holds under the token's key, and reads it with the token's query:

    state = exp(decay) * state
    state = state + key (strength * (value - state^T key))^T
    output = state^T query

The corrections of the tokens of a chunk depend on each other by a triangular system; solved at
once, they leave matrix products, and a loop over chunks in place of one over tokens. The result is
the recurrence's (Yang et al., "Gated Delta Networks", 2024). Sums are taken in fp32 (fp64 for fp64
inputs), in a fixed order.

What is kept for the backward pass: the inputs, and the state at every ``STRETCH`` tokens. The
backward pass computes one stretch again at a time, so that its working memory does not grow with
the length.

Legend: B rows, T tokens, G key heads, R value heads of each key head, K size of a key, V size of a
value, N chunks of C tokens, X = B * G * R states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.errors import InputError

__all__ = ["CHUNK", "STRETCH", "gated_delta_rule", "unit_length"]

CHUNK = 64
"""Tokens whose corrections are solved for at once."""
STRETCH = 1024
"""Tokens between two states that are kept for the backward pass; a multiple of ``CHUNK``."""

_EPSILON = 1e-6


def gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTGRV: Tensor,
    decay_BTGR: Tensor,
    strength_BTGR: Tensor,
    *,
    documents_T: Tensor | None = None,
    state_BGRKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of all tokens, and the state behind the last.

    Queries and keys are scaled to length 1 here, queries then by 1 / sqrt(K).

    Args:
        q_BTGK: queries, of any length.
        k_BTGK: keys, of any length.
        v_BTGRV: values.
        decay_BTGR: logarithm of what remains of the state, at most 0; -inf forgets all.
        strength_BTGR: of the correction, from 0 (none) to 1.
        documents_T: integers that differ between neighbouring documents of packed rows: the state
            does not pass from one to the next. None: rows are one document.
        state_BGRKV: before the first token (of the first document); zeros by default.

    Returns:
        Outputs [B, T, G, R, V] in the values' dtype, and the state [B, G, R, K, V] in the dtype of
        the sums, of the last document in packed rows.

    Raises:
        InputError: shapes that do not fit each other.
    """
    _check(q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
    B, T, G, R, V = v_BTGRV.shape
    if state_BGRKV is None:
        wide = torch.promote_types(v_BTGRV.dtype, torch.float32)
        state_BGRKV = v_BTGRV.new_zeros(B, G, R, k_BTGK.size(-1), V, dtype=wide)
    if T == 0:
        return v_BTGRV, state_BGRKV
    out_BTGRV, after_BGRKV = _DeltaRule.apply(
        q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR, state_BGRKV, documents_T
    )
    return out_BTGRV, after_BGRKV


def unit_length(x: Tensor) -> Tensor:
    """Vectors over the last dimension scaled to length 1 (tiny ones to less)."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + _EPSILON)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        state_BGRKV: Tensor,
        documents_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tokens = (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
        outputs, states = [], [state_BGRKV]
        for start in range(0, v_BTGRV.size(1), STRETCH):
            out, state = _stretch(*_part(tokens, start), states[-1], _seams(documents_T, start))
            outputs.append(out)
            states.append(state)
        ctx.save_for_backward(*tokens, documents_T, *states[:-1])
        return torch.cat(outputs, dim=1), states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTGRV: Tensor, grad_BGRKV: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, documents_T = ctx.saved_tensors[:6]
        states = ctx.saved_tensors[6:]
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in tokens]
        for index in reversed(range(len(states))):
            start = index * STRETCH
            inputs = [*_part(tokens, start), states[index]]
            leaves = [one.detach().requires_grad_() for one in inputs]
            with torch.enable_grad():
                out, state = _stretch(*leaves, _seams(documents_T, start))
            *parts, grad_BGRKV = torch.autograd.grad(
                (out, state), leaves, (grad_BTGRV[:, start : start + STRETCH], grad_BGRKV)
            )
            for whole, part in zip(gradients, parts, strict=True):
                whole[:, start : start + STRETCH] = part
        return *gradients, grad_BGRKV, None


class _Seams(NamedTuple):
    """Where the documents of one stretch meet.

    Attributes:
        before: document number of the token before the stretch (of its own first, in the row's).
        numbers_N: of its tokens, padded to whole chunks by repeating the last.
    """

    before: Tensor
    numbers_NC: Tensor


def _seams(documents_T: Tensor | None, start: int) -> _Seams | None:
    if documents_T is None:
        return None
    numbers_T = documents_T[start : start + STRETCH]
    missing = -len(numbers_T) % CHUNK
    numbers_T = torch.cat([numbers_T, numbers_T[-1:].expand(missing)])
    before = max(start - 1, 0)
    return _Seams(documents_T[before : before + 1], numbers_T.view(-1, CHUNK))


def _part(tokens: Any, start: int) -> list[Tensor]:
    return [one[:, start : start + STRETCH] for one in tokens]


def _stretch(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTGRV: Tensor,
    decay_BTGR: Tensor,
    strength_BTGR: Tensor,
    state_BGRKV: Tensor,
    seams: _Seams | None,
) -> tuple[Tensor, Tensor]:
    """Outputs of at most ``STRETCH`` tokens, and the state behind them."""
    B, T, G, R, V = v_BTGRV.shape
    K = k_BTGK.size(-1)
    wide = state_BGRKV.dtype
    q, k = (unit_length(_chunks(x, wide)) for x in (q_BTGK, k_BTGK))  # [B, G, N, C, K]
    q = q * K**-0.5
    v, decay, strength = (
        _chunks(x.flatten(2, 3), wide).unflatten(1, (G, R))
        for x in (v_BTGRV, decay_BTGR[..., None], strength_BTGR[..., None])
    )  # [B, G, R, N, C, V or 1]
    remains = _Remains.of(decay.squeeze(-1), seams)
    key_key, query_key = (x @ k.mT for x in (k, q))
    # What a token's correction takes over from those before it in the chunk.
    system = key_key.unsqueeze(2) * remains.between * strength
    k_in = k.unsqueeze(2) * (strength * remains.since_before)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v * strength, k_in], dim=-1), upper=False, unitriangular=True
    )
    states, corrections, state = _scan(
        *solved.flatten(0, 2).split([V, K], dim=-1),
        (k.unsqueeze(2) * remains.until_end).flatten(0, 2),
        remains.over_chunk.flatten(0, 2),
        state_BGRKV.flatten(0, 2),
    )
    read = (q.unsqueeze(2) * remains.since_before).flatten(0, 2)
    scores = (query_key.unsqueeze(2) * remains.between).flatten(0, 2)
    out = scores @ corrections + read @ states  # [X, N, C, V]
    out_BGRTV = out.view(B, G, R, -1, V)[:, :, :, :T]
    return out_BGRTV.permute(0, 3, 1, 2, 4).to(v_BTGRV.dtype), state.view_as(state_BGRKV)


def _scan(
    u_XNCV: Tensor, w_XNCK: Tensor, k_XNCK: Tensor, remains_XN11: Tensor, state_XKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The states before each chunk, the corrections of its tokens, and the last state.

    The one loop: two products and a scaling for each chunk, of all heads at once.
    """
    states, corrections = [], []
    parts = zip(*(x.unbind(1) for x in (u_XNCV, w_XNCK, k_XNCK, remains_XN11)), strict=True)
    for u_XCV, w_XCK, k_XCK, remains_X11 in parts:
        states.append(state_XKV)
        correction_XCV = torch.baddbmm(u_XCV, w_XCK, state_XKV, alpha=-1)
        corrections.append(correction_XCV)
        state_XKV = torch.baddbmm(state_XKV * remains_X11, k_XCK.mT, correction_XCV)
    return torch.stack(states, dim=1), torch.stack(corrections, dim=1), state_XKV


class _Remains(NamedTuple):
    """Which share of the state remains from one place of a chunk to another; leading [B, G, R, N].

    Attributes:
        between: [C, C] from the column's token to the row's: 0 above the diagonal, 1 on it, and 0
            between documents.
        since_before: [C, 1] from before the chunk to the row's token; likewise the others.
        until_end: [C, 1] from the token to the end of the chunk.
        over_chunk: [1, 1] from before the chunk to its end.
    """

    between: Tensor
    since_before: Tensor
    until_end: Tensor
    over_chunk: Tensor

    @classmethod
    def of(cls, decay: Tensor, seams: _Seams | None) -> _Remains:
        """From logarithms [B, G, R, N, C]."""
        C = decay.size(-1)
        # exp(-100) is 0 beside anything that it is added to, and differences stay finite.
        decay = decay.clamp(min=-100.0)
        ones_CC = torch.ones(C, C, dtype=torch.float64, device=decay.device)
        # A product in place of cumsum, whose order of sums on a GPU is not fixed. The fp64 sums are
        # two numbers of the inputs' dtype, so that small decays behind a large one are not lost.
        exact = decay.double() @ ones_CC.triu()
        high = exact.to(decay.dtype)
        low = (exact.detach() - high.detach().double()).to(decay.dtype)
        later = ones_CC.triu(1).bool()
        between = (high[..., :, None] - high[..., None, :]) + (
            low[..., :, None] - low[..., None, :]
        )
        until_end = (high[..., -1:] - high) + (low[..., -1:] - low)
        since_before, over_chunk = high, high[..., -1:]
        if seams is not None:
            numbers = seams.numbers_NC
            before_N = torch.cat([seams.before, numbers[:-1, -1]])
            later = later | (numbers[:, :, None] != numbers[:, None, :])
            new = numbers != before_N[:, None]
            since_before = since_before.masked_fill(new, -torch.inf)
            over_chunk = over_chunk.masked_fill(new[:, -1:], -torch.inf)
            until_end = until_end.masked_fill(numbers != numbers[:, -1:], -torch.inf)
        return cls(
            between.masked_fill(later, -torch.inf).exp(),
            since_before.exp().unsqueeze(-1),
            until_end.exp().unsqueeze(-1),
            over_chunk.exp().unsqueeze(-1),
        )


def _chunks(x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] as [B, H, N, C, D]; zeros behind the last token, which leave the state alone."""
    B, T, H, D = x_BTHD.shape
    x_BHTD = x_BTHD.transpose(1, 2).to(dtype)
    missing = -T % CHUNK
    if missing:
        x_BHTD = torch.nn.functional.pad(x_BHTD, (0, 0, 0, missing))
    return x_BHTD.reshape(B, H, -1, CHUNK, D)


def _check(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTGRV: Tensor, decay_BTGR: Tensor, strength_BTGR: Tensor
) -> None:
    fits = (
        q_BTGK.shape == k_BTGK.shape
        and (q_BTGK.dim(), v_BTGRV.dim()) == (4, 5)
        and q_BTGK.shape[:3] == v_BTGRV.shape[:3]
        and decay_BTGR.shape == strength_BTGR.shape == v_BTGRV.shape[:4]
    )
    if not fits:
        shapes = [list(x.shape) for x in (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)]
        raise InputError(
            f"queries, keys, values, decays and strengths are {shapes}; expected [B, T, G, K] "
            "twice, [B, T, G, R, V], and [B, T, G, R] twice"
        )
