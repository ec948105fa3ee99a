"""Attention in tiles over the ranks of a context-parallel group, as one differentiable function.

Keys and values travel round a ring while the tiles of those at hand are computed, and the results
are merged by their log-sum-exp; a rank keeps its own rows only, so memory does not depend on the
number of ranks and grows with S, not S squared. In the backward pass the gradients of keys and
values travel with them and end at their owner. The order of every sum is fixed.

Legend: S queries, K keys of one rank, N micro-batch times key heads, R query heads per key head,
D head size, B micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mimo.layers.attention.kernels import attend, attend_backward
from megatron.mimo.layers.attention.tiles import Plan, Tile
from megatron.mimo.layers.attention.visibility import Visibility

__all__ = ["Tiling", "attend_tiles"]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How to compute one attention.

    Attributes:
        plan: the tiles of each step of the ring.
        visibility: the rule that masked tiles ask.
        scale: of the scores.
        dropout: probability of dropping a weight.
        group: the context-parallel group, of as many ranks as the plan has steps; None: one rank.
    """

    plan: Plan
    visibility: Visibility
    scale: float
    dropout: float = 0.0
    group: dist.ProcessGroup | None = None


def attend_tiles(
    q_SNRD: Tensor, k_KND: Tensor, v_KND: Tensor, tiling: Tiling, spans_BS: Tensor | None = None
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of ``tiling.group``.

    Collective over the group, forward and backward: every rank calls it with the same shapes.

    Args:
        q_SNRD: this rank's queries.
        k_KND: its keys.
        v_KND: its values, of the same head size.
        tiling: how.
        spans_BS: span numbers of its tokens; needed where the visibility has spans.

    Returns:
        [S, N, R, D] in q's dtype; rows of no document are 0 and get no gradient.
    """
    result: Tensor = _TiledAttention.apply(q_SNRD, k_KND, v_KND, spans_BS, tiling)
    return result


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_SNRD: Tensor, k_KND: Tensor, v_KND: Tensor, spans_BS: Tensor | None, how: Tiling
    ) -> Tensor:
        wide = torch.promote_types(q_SNRD.dtype, torch.float32)
        out_SNRD = torch.zeros_like(
            q_SNRD,
            dtype=q_SNRD.dtype if how.plan.single else wide,
            memory_format=torch.contiguous_format,
        )
        S, N, R, _ = q_SNRD.shape
        lse_NRS = torch.full((N, R, S), -torch.inf, dtype=wide, device=q_SNRD.device)
        spans = _gather(spans_BS, how.group)
        replays = []
        kv = _Travelling(k_KND, v_KND, group=how.group)
        for step, tiles in enumerate(how.plan.steps):
            if step + 1 < len(how.plan.steps):
                kv.depart()
            k_step, v_step = kv.tensors
            for tile in tiles:
                out, lse, replay = attend(
                    q_SNRD[tile.q],
                    k_step[tile.k],
                    v_step[tile.k],
                    scale=how.scale,
                    causal=tile.causal,
                    allowed=_allowed(tile, step, spans, how, N, q_SNRD.device),
                    dropout=how.dropout,
                )
                replays.append(replay)
                _merge(out_SNRD[tile.q], lse_NRS[:, :, tile.q], out, lse, first=tile.first)
            kv.arrive()
        out_SNRD = out_SNRD.to(q_SNRD.dtype)
        ctx.save_for_backward(q_SNRD, k_KND, v_KND, out_SNRD, lse_NRS, spans)
        ctx.how, ctx.replays = how, replays
        return out_SNRD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SNRD: Tensor) -> tuple[Tensor | None, ...]:
        q_SNRD, k_KND, v_KND, out_SNRD, lse_NRS, spans = ctx.saved_tensors
        how: Tiling = ctx.how
        wide = lse_NRS.dtype
        dq_SNRD = torch.zeros_like(q_SNRD, dtype=wide)
        kv = _Travelling(k_KND, v_KND, group=how.group)
        gradients = _Travelling(
            torch.zeros_like(k_KND, dtype=wide),
            torch.zeros_like(v_KND, dtype=wide),
            group=how.group,
        )
        replays = iter(ctx.replays)
        for step, tiles in enumerate(how.plan.steps):
            if step + 1 < len(how.plan.steps):
                kv.depart()
            k_step, v_step = kv.tensors
            parts = []
            for tile in tiles:
                dq, dk, dv = attend_backward(
                    grad_SNRD[tile.q],
                    q_SNRD[tile.q],
                    k_step[tile.k],
                    v_step[tile.k],
                    out_SNRD[tile.q],
                    lse_NRS[:, :, tile.q],
                    scale=how.scale,
                    causal=tile.causal,
                    allowed=_allowed(tile, step, spans, how, q_SNRD.size(1), q_SNRD.device),
                    dropout=how.dropout,
                    replay=next(replays),
                )
                dq_SNRD[tile.q] += dq
                parts.append((tile.k, dk, dv))
            gradients.arrive()
            for rows, dk, dv in parts:
                gradients.tensors[0][rows] += dk
                gradients.tensors[1][rows] += dv
            if how.group is not None:
                gradients.depart()
            kv.arrive()
        gradients.arrive()
        dk_KND, dv_KND = gradients.tensors
        return dq_SNRD.to(q_SNRD.dtype), dk_KND.to(k_KND.dtype), dv_KND.to(v_KND.dtype), None, None


class _Travelling:
    """Two tensors of equal shape that go to the next rank of a ring and come from the one before.

    Attributes:
        tensors: those that are here.
    """

    def __init__(self, one: Tensor, other: Tensor, *, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.tensors: tuple[Tensor, Tensor] = (one, other)
        self._moving: tuple[list[Any], Tensor, Tensor] | None = None

    def depart(self) -> None:
        """Starts to send them to rank + 1; every rank of the group calls it. They stay readable."""
        assert self.group is not None
        rank, size = self.group.rank(), self.group.size()
        leaving = torch.stack(self.tensors)
        arriving = torch.empty_like(leaving)
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, group=self.group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=(rank - 1) % size),
            ]
        )
        self._moving = (requests, leaving, arriving)

    def arrive(self) -> None:
        """Waits for those from rank - 1; nothing happens where none departed."""
        if self._moving is None:
            return
        requests, _, arriving = self._moving
        for request in requests:
            request.wait()
        self.tensors, self._moving = (arriving[0], arriving[1]), None


def _merge(
    out_sNRD: Tensor, lse_NRs: Tensor, more_sNRD: Tensor, more_lse_NRs: Tensor, *, first: bool
) -> None:
    """Adds, in place, attention to more keys to attention to some."""
    if first:
        out_sNRD.copy_(more_sNRD)
        lse_NRs.copy_(more_lse_NRs)
        return
    # Not infinite: a rank's own keys come first, and every query sees itself.
    total_NRs = torch.logaddexp(lse_NRs, more_lse_NRs)
    for part, lse in ((out_sNRD, lse_NRs), (more_sNRD, more_lse_NRs)):
        share_sNR1 = torch.exp(lse - total_NRs).permute(2, 0, 1).unsqueeze(-1)
        if part is out_sNRD:
            out_sNRD.mul_(share_sNR1)
        else:
            out_sNRD.addcmul_(part.to(out_sNRD.dtype), share_sNR1)
    lse_NRs.copy_(total_NRs)


def _gather(spans_BS: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | None:
    """Every rank's span numbers: [ranks, B, S]."""
    if spans_BS is None:
        return None
    if group is None:
        return spans_BS[None]
    parts = [torch.empty_like(spans_BS) for _ in range(group.size())]
    dist.all_gather(parts, spans_BS.contiguous(), group=group)
    return torch.stack(parts)


def _allowed(
    tile: Tile, step: int, spans: Tensor | None, how: Tiling, N: int, device: torch.device
) -> Tensor | None:
    """The mask of a masked tile: bool [N or 1, 1, s, k]."""
    if not tile.masked:
        return None
    queries = torch.arange(tile.q.stop - tile.q.start, device=device) + tile.q_position
    keys = torch.arange(tile.k.stop - tile.k.start, device=device) + tile.k_position
    if spans is None:
        return how.visibility.allowed(queries, keys)[:, None]
    rank = 0 if how.group is None else how.group.rank()
    allowed_Bsk = how.visibility.allowed(
        queries,
        keys,
        spans[rank][:, tile.q],
        spans[(rank - step) % spans.size(0)][:, tile.k],
    )
    if allowed_Bsk.size(0) > 1:
        allowed_Bsk = allowed_Bsk.repeat_interleave(N // allowed_Bsk.size(0), dim=0)
    return allowed_Bsk[:, None]
