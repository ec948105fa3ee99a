"""The gated delta rule over some chunks of tokens: what it computes, and its gradients.

Within a chunk the correction of each token depends on those before it, by a triangular system that
is inverted; what passes from chunk to chunk is the state. With S the state before a chunk, K, Q, V
its keys, queries and values, and beta its strengths (one row each):

    corrections = inverse (beta (V - since K S))             inverse of 1 + system
    system      = beta (K K^T) between, below the diagonal
    outputs     = since Q S + scores corrections             scores = (Q K^T) between
    next S      = over S + K^T (until corrections)

where since, until, between and over say what remains of the state from one place to another
(``Remains``). ``backward`` has the derivatives of these four lines. No gradient is recorded here:
functions take and give plain tensors.

Legend: N chunks, X states (of all rows and value heads), C tokens of a chunk, K size of a key, V
size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Chunks", "Gradients", "Remains", "backward", "forward", "prepare"]


class Remains(NamedTuple):
    """Which share of the state remains from one place of a chunk to another.

    Attributes:
        between_NXCC: from the column's token to the row's: 0 above the diagonal and 1 on it; 0
            between documents.
        since_NXC1: from before the chunk to the row's token.
        until_NXC1: from the token to the end of the chunk.
        over_NX11: from before the chunk to its end.
    """

    between_NXCC: Tensor
    since_NXC1: Tensor
    until_NXC1: Tensor
    over_NX11: Tensor


class Chunks(NamedTuple):
    """What the chunks are before any state is known.

    Attributes:
        kq_NXCK: keys and, behind them, queries: 2 C rows.
        v_NXCV: values.
        strength_NXC1: of the corrections.
        remains: of the state.
        system_NXCC: strictly below the diagonal.
        inverse_NXCC: of 1 + system.
        scores_NXCC: of queries and keys, times what remains between them.
    """

    kq_NXCK: Tensor
    v_NXCV: Tensor
    strength_NXC1: Tensor
    remains: Remains
    system_NXCC: Tensor
    inverse_NXCC: Tensor
    scores_NXCC: Tensor


class Gradients(NamedTuple):
    """With respect to what ``prepare`` is given, and to the state before the chunks.

    Attributes:
        kq_NXCK, v_NXCV, strength_NXC1: as in ``Chunks``.
        decay_NXC: to the sums of the decays' logarithms from the start of each chunk.
        state_XKV: before the first chunk.
    """

    kq_NXCK: Tensor
    v_NXCV: Tensor
    strength_NXC1: Tensor
    decay_NXC: Tensor
    state_XKV: Tensor


def prepare(kq_NXCK: Tensor, v_NXCV: Tensor, strength_NXC1: Tensor, remains: Remains) -> Chunks:
    """What does not depend on the state: the system, its inverse and the scores."""
    C = v_NXCV.size(2)
    products = kq_NXCK @ kq_NXCK[:, :, :C].mT
    key_key, scores = products[:, :, :C], products[:, :, C:]
    scores.mul_(remains.between_NXCC)
    key_key.mul_(remains.between_NXCC).mul_(strength_NXC1).mul_(_below(key_key))
    ones_CC = torch.eye(C, dtype=v_NXCV.dtype, device=v_NXCV.device)
    inverse = torch.linalg.solve_triangular(
        key_key, ones_CC.expand_as(key_key), upper=False, unitriangular=True
    )
    return Chunks(kq_NXCK, v_NXCV, strength_NXC1, remains, key_key, inverse, scores)


class Passed(NamedTuple):
    """What passing through the chunks has computed.

    Attributes:
        states_MXKV: before each chunk, and behind the last: M = N + 1.
        missing_NXCV: values minus what the state holds under the keys.
        corrections_NXCV: of the chunks' tokens.
        reads_NXCV: keys and queries times the state: 2 C rows.
    """

    states_MXKV: Tensor
    missing_NXCV: Tensor
    corrections_NXCV: Tensor
    reads_NXCV: Tensor


def forward(chunks: Chunks, state_XKV: Tensor, least: float) -> tuple[Tensor, Passed]:
    """Outputs [N, X, C, V] and what led to them.

    Args:
        chunks: of ``prepare``.
        state_XKV: before the first chunk.
        least: numbers of a state that are no larger are taken as 0; 0.0 for none.
    """
    N, _, C, _ = chunks.v_NXCV.shape
    remains, k_NXCK = chunks.remains, chunks.kq_NXCK[:, :, :C]
    states = state_XKV.new_empty(N + 1, *state_XKV.shape)
    states[0] = state_XKV
    reads = chunks.v_NXCV.new_empty(*chunks.v_NXCV.shape[:2], 2 * C, chunks.v_NXCV.size(-1))
    missing, corrections = torch.empty_like(chunks.v_NXCV), torch.empty_like(chunks.v_NXCV)
    for i in range(N):
        torch.bmm(chunks.kq_NXCK[i], states[i], out=reads[i])
        held_XCV = reads[i, :, :C]
        torch.addcmul(chunks.v_NXCV[i], remains.since_NXC1[i], held_XCV, value=-1, out=missing[i])
        torch.bmm(chunks.inverse_NXCC[i], chunks.strength_NXC1[i] * missing[i], out=corrections[i])
        torch.mul(states[i], remains.over_NX11[i], out=states[i + 1])
        states[i + 1].baddbmm_(k_NXCK[i].mT, remains.until_NXC1[i] * corrections[i])
        _drop(states[i + 1], least)
    out = chunks.scores_NXCC @ corrections
    out.addcmul_(remains.since_NXC1, reads[:, :, C:])
    return out, Passed(states, missing, corrections, reads)


def backward(
    chunks: Chunks, passed: Passed, out_NXCV: Tensor, state_XKV: Tensor, least: float
) -> Gradients:
    """The adjoint of ``forward`` and ``prepare``.

    Args:
        chunks: what ``forward`` was given.
        passed: what it gave.
        out_NXCV: gradient with respect to the outputs.
        state_XKV: gradient with respect to the state behind the chunks.
        least: as there, of these gradients.
    """
    N, _, C, _ = out_NXCV.shape
    remains, k_NXCK = chunks.remains, chunks.kq_NXCK[:, :, :C]
    # Through the chunks, from the last to the first.
    d_states = torch.empty_like(passed.states_MXKV)
    d_states[N] = state_XKV
    d_reads = torch.empty_like(passed.reads_NXCV)
    torch.mul(remains.since_NXC1, out_NXCV, out=d_reads[:, :, C:])
    d_corrections = chunks.scores_NXCC.mT @ out_NXCV
    d_solved, k_d_states = torch.empty_like(out_NXCV), torch.empty_like(out_NXCV)
    for i in reversed(range(N)):
        torch.bmm(k_NXCK[i], d_states[i + 1], out=k_d_states[i])
        d_corrections[i].addcmul_(remains.until_NXC1[i], k_d_states[i])
        torch.bmm(chunks.inverse_NXCC[i].mT, d_corrections[i], out=d_solved[i])
        weight = remains.since_NXC1[i] * chunks.strength_NXC1[i]
        torch.mul(d_solved[i], -weight, out=d_reads[i, :, :C])
        torch.mul(d_states[i + 1], remains.over_NX11[i], out=d_states[i])
        d_states[i].baddbmm_(chunks.kq_NXCK[i].mT, d_reads[i])
        _drop(d_states[i], least)
    return _gradients(chunks, passed, out_NXCV, d_states, d_reads, d_solved, k_d_states)


def _gradients(
    chunks: Chunks,
    passed: Passed,
    out_NXCV: Tensor,
    d_states: Tensor,
    d_reads: Tensor,
    d_solved: Tensor,
    k_d_states: Tensor,
) -> Gradients:
    """What needs no order of the chunks: all of them at once."""
    C = out_NXCV.size(2)
    remains, strength = chunks.remains, chunks.strength_NXC1
    k, q = chunks.kq_NXCK[:, :, :C], chunks.kq_NXCK[:, :, C:]
    corrections = passed.corrections_NXCV
    d_system = d_solved @ corrections.mT
    d_system.mul_(-_below(d_system))
    d_scores = out_NXCV @ corrections.mT
    # What remains between two tokens is the exponential of a difference of sums of decays.
    flow = d_scores * chunks.scores_NXCC
    per_system = d_system * chunks.system_NXCC
    d_strength = _rows(d_solved, passed.missing_NXCV)
    # A row of the system is a multiple of the strength; where that is 0, so is the row.
    d_system.mul_(remains.between_NXCC)
    d_scores.mul_(remains.between_NXCC)
    key_key = k @ k.mT
    d_strength += _rows(d_system, key_key)
    d_system.mul_(strength)
    flow += per_system
    d_kq = d_reads @ passed.states_MXKV[:-1].mT
    d_k, d_q = d_kq[:, :, :C], d_kq[:, :, C:]
    d_q += d_scores @ k
    d_k += d_scores.mT @ q
    d_k += (d_system + d_system.mT) @ k
    d_k += (remains.until_NXC1 * corrections) @ d_states[1:].mT

    since = remains.since_NXC1 * _rows(out_NXCV, passed.reads_NXCV[:, :, C:])
    d_values = strength * d_solved
    since += _rows(d_reads[:, :, :C], passed.reads_NXCV[:, :, :C])
    until = remains.until_NXC1 * _rows(corrections, k_d_states)
    over = remains.over_NX11 * (passed.states_MXKV[:-1] * d_states[1:]).sum((-2, -1), keepdim=True)
    d_decay = flow.sum(-1, keepdim=True) - flow.sum(-2).unsqueeze(-1) + since - until
    d_decay[:, :, -1:] += over + until.sum(-2, keepdim=True)
    return Gradients(d_kq, d_values, d_strength, d_decay.squeeze(-1), d_states[0])


def _drop(state_XKV: Tensor, least: float) -> None:
    """In place: a processor takes many times as long for numbers that are almost 0."""
    if least:
        torch.hardshrink(state_XKV, least, out=state_XKV)


def _below(x_CC: Tensor) -> Tensor:
    """Ones below the diagonal: a product with them is faster than ``tril``."""
    return x_CC.new_ones(x_CC.shape[-2:]).tril(-1)


def _rows(one: Tensor, other: Tensor) -> Tensor:
    """Products of rows: [..., C, 1]."""
    return (one * other).sum(-1, keepdim=True)
