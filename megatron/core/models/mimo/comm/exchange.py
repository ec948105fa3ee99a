"""Rows that change ranks: each rank gives some of its rows to others and takes some of theirs.

Legend: N rows, H features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.utils import get_pg_rank, get_pg_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """What one rank gives and takes; index tensors are on the host.

    Attributes:
        give: for each rank of the group, long [n]: which of this rank's rows it gets.
        take: for each rank of the group, long [n]: where in the result its rows go. What rank a
            gives b is as long as what b takes from a.
        size: rows of the result.
    """

    give: tuple[torch.Tensor, ...]
    take: tuple[torch.Tensor, ...]
    size: int

    def rows_sent(self, rank: int) -> int:
        """Rows that leave this rank, which is number ``rank`` of the group."""
        return sum(index_n.numel() for other, index_n in enumerate(self.give) if other != rank)


def exchange_rows(
    rows_NH: torch.Tensor, routes: Routes, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The rows [size, H] that this rank takes; zeros where it takes none.

    All ranks of the group take part, with rows of one width and dtype, in one all-to-all of the
    rows that change ranks. Without gradient; the adjoint of routes that place every row once is
    the exchange by the reverse routes.

    Args:
        rows_NH: [N, H], this rank's.
        routes: what goes where.
        group: the ranks; None for this rank alone.
    """
    rank, size = get_pg_rank(group) if group else 0, get_pg_size(group) if group else 1
    device = rows_NH.device
    taken_NH = rows_NH.new_zeros(routes.size, rows_NH.size(1))
    kept_n, put_n = routes.give[rank].to(device), routes.take[rank].to(device)
    taken_NH.index_copy_(0, put_n, rows_NH.index_select(0, kept_n))
    if size == 1:
        return taken_NH
    nothing = torch.empty(0, dtype=torch.long)
    give = [nothing if other == rank else index_n for other, index_n in enumerate(routes.give)]
    take = [nothing if other == rank else index_n for other, index_n in enumerate(routes.take)]
    sent_NH = rows_NH.index_select(0, torch.cat(give).to(device))
    put_N = torch.cat(take).to(device)
    received_NH = rows_NH.new_empty(put_N.numel(), rows_NH.size(1))
    # As bytes: not every backend knows every dtype.
    dist.all_to_all_single(
        received_NH.view(torch.uint8),
        sent_NH.view(torch.uint8),
        [index_n.numel() for index_n in take],
        [index_n.numel() for index_n in give],
        group=group,
    )
    return taken_NH.index_copy_(0, put_N, received_NH)


def exchange_with_gradient(
    rows_NH: torch.Tensor, routes: Routes, back: Routes, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """``exchange_rows`` whose gradient is exchanged by ``back``; both are collective.

    Backward is an exchange too: the results of all ranks reach a loss, or those of none.
    """
    taken_NH: torch.Tensor = _Exchange.apply(rows_NH, routes, back, group)
    return taken_NH


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_NH: torch.Tensor,
        routes: Routes,
        back: Routes,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.back, ctx.group = back, group
        return exchange_rows(rows_NH, routes, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange_rows(grad_outputs[0].contiguous(), ctx.back, ctx.group), None, None, None
