"""The gated delta rule in chunks, in PyTorch: linear in length, forward and backward.

Each head keeps a matrix, its state, that maps keys to values. A token forgets a part of the state,
corrects what it holds under the token's key, and reads it with the token's query:

    state = exp(decay) * state
    state = state + key (strength * (value - state^T key))^T
    output = state^T query

Taken chunk by chunk (Yang et al., "Gated Delta Networks", 2024) these are matrix products, and a
loop over chunks in place of one over tokens: ``chunkwise``. Sums are taken in fp32 (fp64 for fp64
inputs), in a fixed order.

What is kept for the backward pass: the inputs, and the state before every stretch of tokens. The
backward pass computes one stretch again at a time, so that its working memory does not grow with
the length.

Legend: B rows, T tokens, G key heads, R value heads of each key head, K size of a key, V size of a
value; N chunks of C tokens, X = B * G * R states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.layers.gated_delta_net.chunkwise import (
    Chunks,
    Gradients,
    Remains,
    backward,
    forward,
    prepare,
)

__all__ = ["CHUNK", "delta_rule_of_pieces", "gated_delta_rule", "stretch_of", "unit_length"]

CHUNK = 64
"""Tokens whose corrections are solved for at once."""

_EPSILON = 1e-6
_LEAST = -100.0
"""Decays below this are taken as this: nothing in fp32 tells exp(-100) from 0, and all sums of them
are finite."""


def stretch_of(device: torch.device) -> int:
    """Tokens between two states that are kept, a multiple of ``CHUNK``.

    On the CPU what a stretch computes with should stay in the caches; elsewhere few and large
    kernels are fast.
    """
    return (4 if device.type == "cpu" else 32) * CHUNK


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
        documents_T: the number of each token's document, in packed rows: the state does not pass
            from one to the next. None: rows are one document.
        state_BGRKV: before the first token (of the first document); zeros by default.

    Returns:
        Outputs [B, T, G, R, V] in the values' dtype, and the state [B, G, R, K, V] in the dtype of
        the sums, of the last document in packed rows.

    Raises:
        InputError: shapes that do not fit each other.
    """
    _check(q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
    B, T, G, R, V = v_BTGRV.shape
    wide = torch.promote_types(v_BTGRV.dtype, torch.float32)
    if state_BGRKV is None:
        state_BGRKV = v_BTGRV.new_zeros(B, G, R, k_BTGK.size(-1), V, dtype=wide)
    state_BGRKV = state_BGRKV.to(wide)
    if T == 0:
        return v_BTGRV, state_BGRKV
    tokens = (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
    out_BTGRV, after_BPGRKV = _DeltaRule.apply(
        *tokens, state_BGRKV.unsqueeze(1), documents_T, (0, T), 0.0
    )
    return out_BTGRV, after_BPGRKV.squeeze(1)


def delta_rule_of_pieces(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTGRV: Tensor,
    decay_BTGR: Tensor,
    strength_BTGR: Tensor,
    borders: tuple[int, ...],
    states_BPGRKU: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rule over P pieces of each row, which lie one behind the other.

    Tokens are those of ``gated_delta_rule``; ``borders`` are the summed lengths of the pieces,
    ascending from 0 to T, and ``states_BPGRKU`` the state before each, in the dtype of the sums. It
    may have more columns than the values: U >= V, and values are 0 in the others.

    Returns:
        Outputs [B, T, G, R, U], and the state behind each piece [B, P, G, R, K, U].
    """
    tokens = (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
    # A state of the identity, which no value feeds, decays until it is almost 0. Numbers that
    # round off are taken as 0 in time for their products to be numbers that are fast, too.
    least = torch.finfo(states_BPGRKU.dtype).tiny ** (1 / 3)
    out_BTGRU, after_BPGRKU = _DeltaRule.apply(*tokens, states_BPGRKU, None, borders, least)
    return out_BTGRU, after_BPGRKU


def unit_length(x: Tensor) -> Tensor:
    """Vectors over the last dimension scaled to length 1 (tiny ones to less)."""
    return x * _inverse_length(x)


def _inverse_length(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + _EPSILON)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTGRV: Tensor,
        decay_BTGR: Tensor,
        strength_BTGR: Tensor,
        states_BPGRKV: Tensor,
        documents_T: Tensor | None,
        borders: tuple[int, ...],
        least: float,
    ) -> tuple[Tensor, Tensor]:
        tokens = (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR)
        out_BTGRV = v_BTGRV.new_empty(*v_BTGRV.shape[:-1], states_BPGRKV.size(-1))
        after_BPGRKV = torch.empty_like(states_BPGRKV, memory_format=torch.contiguous_format)
        kept_XKV = []
        for piece, parts in enumerate(_parts(borders, v_BTGRV.device)):
            state_XKV = states_BPGRKV[:, piece].flatten(0, 2)
            for part in parts:
                stretch = _Stretch(tokens, documents_T, part, state_XKV)
                kept_XKV.append(state_XKV)
                out_NXCV, passed = forward(stretch.chunks, state_XKV, least)
                out_BTGRV[:, part] = stretch.by_tokens(out_NXCV).view_as(out_BTGRV[:, part])
                state_XKV = passed.states_MXKV[-1].clone()
            after_BPGRKV[:, piece] = state_XKV.view_as(after_BPGRKV[:, piece])
        ctx.save_for_backward(*tokens, documents_T, *kept_XKV)
        ctx.borders, ctx.least = borders, least
        return out_BTGRV, after_BPGRKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTGRV: Tensor, grad_BPGRKV: Tensor) -> tuple[Tensor | None, ...]:
        *tokens, documents_T = ctx.saved_tensors[:6]
        kept_XKV = list(ctx.saved_tensors[6:])
        gradients = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in tokens]
        first_BPGRKV = torch.empty_like(grad_BPGRKV, memory_format=torch.contiguous_format)
        pieces = enumerate(_parts(ctx.borders, grad_BTGRV.device))
        for piece, parts in reversed(list(pieces)):
            grad_XKV = grad_BPGRKV[:, piece].flatten(0, 2)
            for part in reversed(parts):
                state_XKV = kept_XKV.pop()
                stretch = _Stretch(tokens, documents_T, part, state_XKV)
                _, passed = forward(stretch.chunks, state_XKV, ctx.least)
                grad_NXCV = _by_chunks(grad_BTGRV[:, part], state_XKV.dtype)
                found = backward(stretch.chunks, passed, grad_NXCV, grad_XKV, ctx.least)
                grad_XKV = found.state_XKV
                for whole, one in zip(gradients, stretch.gradients(found), strict=True):
                    whole[:, part] = one.view_as(whole[:, part])
            first_BPGRKV[:, piece] = grad_XKV.view_as(first_BPGRKV[:, piece])
        return *gradients, first_BPGRKV, None, None, None


def _parts(borders: tuple[int, ...], device: torch.device) -> list[list[slice]]:
    """The stretches of tokens of each piece."""
    step = stretch_of(device)
    return [
        [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]
        for start, stop in itertools.pairwise(borders)
    ]


class _Stretch:
    """Some tokens as chunks, and gradients of chunks as those of the tokens.

    Attributes:
        chunks: the last one filled up with tokens that leave the state alone.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        documents_T: Tensor | None,
        part: slice,
        state_XKV: Tensor,
    ) -> None:
        q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, strength_BTGR = (one[:, part] for one in tokens)
        self._B, self._T, self._G, R, self._V = v_BTGRV.shape
        dtype = state_XKV.dtype
        self._scale = k_BTGK.size(-1) ** -0.5
        keys_queries = [_by_chunks(x, dtype) for x in (k_BTGK, q_BTGK)]  # [N, B * G, C, K]
        self._inverse_lengths = [_inverse_length(x) for x in keys_queries]
        self._units = [
            x.mul_(inverse) for x, inverse in zip(keys_queries, self._inverse_lengths, strict=True)
        ]
        k, q = (unit.unsqueeze(2) for unit in self._units)
        N, Y, _, C, K = k.shape
        kq = k.new_empty(N, Y, R, 2 * C, K)  # a copy for each value head
        kq[:, :, :, :C] = k
        kq[:, :, :, C:] = q * self._scale
        v = F.pad(_by_chunks(v_BTGRV, dtype), (0, state_XKV.size(-1) - self._V))
        decay, strength = (_by_chunks(x.unsqueeze(-1), dtype) for x in (decay_BTGR, strength_BTGR))
        self._counts = decay.squeeze(-1) >= _LEAST
        seams = None if documents_T is None else _seams(documents_T, part)
        remains = remains_of(decay.squeeze(-1).clamp(min=_LEAST), seams)
        self.chunks: Chunks = prepare(kq.flatten(1, 2), v, strength, remains)

    def by_tokens(self, x_NXCD: Tensor) -> Tensor:
        """[B, T, heads, D] of chunks."""
        N, _, C, D = x_NXCD.shape
        x_NBHCD = x_NXCD.view(N, self._B, -1, C, D)
        return x_NBHCD.permute(1, 0, 3, 2, 4).reshape(self._B, N * C, -1, D)[:, : self._T]

    def gradients(self, found: Gradients) -> Iterator[Tensor]:
        """With respect to queries, keys, values, decays and strengths, by tokens."""
        d_kq = found.kq_NXCK.unflatten(1, (self._B * self._G, -1)).sum(2)
        d_k, d_q = d_kq.chunk(2, dim=2)
        d_units = (d_k, d_q * self._scale)
        d_k, d_q = (
            inverse * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))
            for unit, inverse, d_unit in zip(
                self._units, self._inverse_lengths, d_units, strict=True
            )
        )
        # A decay counts in the sums of its own token and of those behind it.
        d_sums = found.decay_NXC.double()
        d_decay = (
            d_sums @ torch.ones_like(d_sums[0, :1]).expand(CHUNK, CHUNK).tril()
        ) * self._counts
        d_v = found.v_NXCV[..., : self._V]
        for one in (d_q, d_k, d_v, d_decay.unsqueeze(-1), found.strength_NXC1):
            yield self.by_tokens(one)


def remains_of(decay_NXC: Tensor, numbers_NC: Tensor | None) -> Remains:
    """Which share of the state remains between the places of each chunk.

    Args:
        decay_NXC: logarithms, finite.
        numbers_NC: document numbers of the tokens, behind that of the token before each chunk:
            [N, 1 + C]; None for one document.
    """
    C = decay_NXC.size(-1)
    ones_CC = torch.ones(C, C, dtype=torch.float64, device=decay_NXC.device)
    # A product in place of cumsum, whose order of sums on a GPU is not fixed. The fp64 sums are two
    # numbers of the inputs' dtype, so that small decays behind a large one are not lost.
    exact = decay_NXC.double() @ ones_CC.triu()
    high = exact.to(decay_NXC.dtype)
    low = (exact - high).to(decay_NXC.dtype)
    between = high.unsqueeze(-1) - high.unsqueeze(-2)
    between += low.unsqueeze(-1) - low.unsqueeze(-2)
    until = (high[..., -1:] - high) + (low[..., -1:] - low)
    since, over = high.clone(), high[..., -1:].clone()
    hidden = ones_CC.triu(1).bool()
    if numbers_NC is not None:
        before_N1, numbers_NC = numbers_NC[:, :1], numbers_NC[:, 1:]
        hidden = hidden | (numbers_NC[:, :, None] != numbers_NC[:, None, :])[:, None]
        new = (numbers_NC != before_N1)[:, None]
        since.masked_fill_(new, -torch.inf)
        over.masked_fill_(new[..., -1:], -torch.inf)
        until.masked_fill_((numbers_NC != numbers_NC[:, -1:])[:, None], -torch.inf)
    between.masked_fill_(hidden, -torch.inf)
    return Remains(
        between.exp_(),
        since.exp_().unsqueeze(-1),
        until.exp_().unsqueeze(-1),
        over.exp_().unsqueeze(-1),
    )


def _seams(documents_T: Tensor, part: slice) -> Tensor:
    """Document numbers of each chunk's tokens, behind that of the token before it: [N, 1 + C]."""
    numbers_T = documents_T[part]
    missing = -len(numbers_T) % CHUNK
    numbers_NC = torch.cat([numbers_T, numbers_T[-1:].expand(missing)]).view(-1, CHUNK)
    first = documents_T[max(part.start - 1, 0)].view(1)
    before_N = torch.cat([first, numbers_NC[:-1, -1]])
    return torch.cat([before_N[:, None], numbers_NC], dim=1)


def _by_chunks(x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, B * heads, C, D] of [B, T, ..., D]; zeros behind the last token."""
    missing = -x_BTHD.size(1) % CHUNK
    if missing:
        x_BTHD = F.pad(x_BTHD, (0, 0) * (x_BTHD.dim() - 2) + (0, missing))
    x_NBHCD = x_BTHD.unflatten(1, (-1, CHUNK)).movedim(2, -2).transpose(0, 1)
    chunks = torch.empty(x_NBHCD.shape, dtype=dtype, device=x_BTHD.device)
    return chunks.copy_(x_NBHCD).flatten(1, -3)


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
