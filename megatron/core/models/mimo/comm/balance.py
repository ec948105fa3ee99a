"""Dealing items of different cost out to owners."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal_out(costs: Sequence[float], owners: int, loads: list[float] | None = None) -> list[int]:
    """The owner of each item: the dearest first, each to the owner that has the least so far.

    The dearest owner has at most 4/3 - 1/(3 * owners) of what the best division gives it. The same
    costs give the same owners everywhere.

    Args:
        costs: cost of each item, none below 0.
        owners: number of owners.
        loads: what each owner has already, to which its items are added; nothing if left out.
    """
    loads = [0.0] * owners if loads is None else loads
    heap = [(load, owner) for owner, load in enumerate(loads)]
    heapq.heapify(heap)
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        _, owner = heapq.heappop(heap)
        chosen[item] = owner
        loads[owner] += costs[item]
        heapq.heappush(heap, (loads[owner], owner))
    return chosen
