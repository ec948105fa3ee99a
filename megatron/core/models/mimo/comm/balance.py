"""Dealing items of different cost out to owners."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal_out(costs: Sequence[float], owners: int) -> list[int]:
    """The owner of each item: the dearest first, each to the owner that has the least so far.

    The dearest owner has at most 4/3 - 1/(3 * owners) of what the best division gives it. The same
    costs give the same owners everywhere.

    Args:
        costs: of each item, none below 0.
        owners: their number.
    """
    loads = [(0.0, owner) for owner in range(owners)]
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, owner = heapq.heappop(loads)
        chosen[item] = owner
        heapq.heappush(loads, (load + costs[item], owner))
    return chosen
