"""Divides a global batch over ranks and micro-batches, so that all have about equal work.

A batch is divided after it is formed: the layout decides which rank computes an item (a sequence),
never which items there are. Every rank gets the same number of items, in micro-batches of one size.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.measure import Measure

__all__ = ["CostModel", "busiest_over_mean", "divide"]

_SWAPS = 64  # exchanges after the items are dealt out, at most
_CLOSE = 0.005  # of the mean cost; parts that differ by less are left as they are


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The work of an item, in any unit.

    Attributes:
        per_token: of the language model for each place of the sequence, padding included.
        per_pair: of its attention for each pair of tokens of a sample that see each other.
        encoders: the same two numbers for each modality's encoders, by rows of a medium, which are
            a fixed fraction of what an encoder attends to.
    """

    per_token: float = 1.0
    per_pair: float = 0.0
    encoders: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def of(self, samples: Sequence[Measure], places: int, *, packed: bool) -> float:
        """Work of one sequence.

        Args:
            samples: in it.
            places: tokens of the sequence, padding included.
            packed: attention stays within samples; otherwise it is computed for all places.
        """
        pairs = sum(one.length**2 for one in samples) if packed else places**2
        total = self.per_token * places + self.per_pair * pairs / 2
        for one in samples:
            for modality, rows in one.media:
                per_row, per_pair = self.encoders.get(modality, (0.0, 0.0))
                total += per_row * rows + per_pair * rows**2
        return total


def divide(costs: Sequence[float], ranks: int, micro_batch: int) -> list[list[tuple[int, ...]]]:
    """The micro-batches of each rank, as numbers of items; the most expensive ones come first.

    Micro-batches at the same place of different ranks cost about the same, because ranks of a
    pipeline wait for each other at each of them.

    Args:
        costs: of the items of a global batch.
        ranks: among which it is divided.
        micro_batch: items of each micro-batch.

    Raises:
        ConfigError: the items do not divide evenly.
    """
    if len(costs) % (ranks * micro_batch):
        raise ConfigError(
            f"a global batch of {len(costs)} does not divide into micro-batches of {micro_batch} "
            f"on {ranks} data-parallel ranks; use a multiple of {ranks * micro_batch}"
        )
    shares = _deal(costs, range(len(costs)), ranks)
    result = []
    for share in shares:
        batches = _deal(costs, share, len(share) // micro_batch)
        batches.sort(key=lambda one: (-sum(costs[item] for item in one), one))
        result.append([tuple(sorted(one)) for one in batches])
    return result


def busiest_over_mean(costs: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """The busiest rank's work over the mean of all: 1 where no rank waits for another."""
    loads = [sum(costs[item] for item in share) for share in shares]
    return max(loads) * len(loads) / sum(loads)


def _deal(costs: Sequence[float], items: Sequence[int], hands: int) -> list[list[int]]:
    """Divide into as many equally large parts of about equal cost; a function of the costs alone.

    Items are dealt out from the most expensive on, each to the part that costs least and has room;
    then items of the most expensive and the cheapest part are exchanged as long as that helps.
    """
    room = len(items) // hands
    loads = [(0.0, hand) for hand in range(hands)]
    parts: list[list[int]] = [[] for _ in range(hands)]
    for item in sorted(items, key=lambda one: (-costs[one], one)):
        load, hand = heapq.heappop(loads)
        parts[hand].append(item)
        if len(parts[hand]) < room:
            heapq.heappush(loads, (load + costs[item], hand))
    totals = [sum(costs[item] for item in part) for part in parts]
    for _ in range(_SWAPS if hands > 1 else 0):
        if not _exchange(costs, parts, totals):
            break
    return parts


def _exchange(costs: Sequence[float], parts: list[list[int]], totals: list[float]) -> bool:
    """Swap the pair between the busiest and the idlest that brings them closest, if any does."""
    busy = max(range(len(parts)), key=lambda hand: (totals[hand], -hand))
    idle = min(range(len(parts)), key=lambda hand: (totals[hand], hand))
    gap = totals[busy] - totals[idle]
    if gap <= _CLOSE * sum(totals) / len(totals):
        return False
    best = (gap * (1 - 1e-9), -1, -1)
    for one, mine in enumerate(parts[busy]):
        for two, other in enumerate(parts[idle]):
            after = abs(gap - 2 * (costs[mine] - costs[other]))
            best = min(best, (after, one, two))
    if best[1] < 0:
        return False
    _, one, two = best
    moved = costs[parts[busy][one]] - costs[parts[idle][two]]
    parts[busy][one], parts[idle][two] = parts[idle][two], parts[busy][one]
    totals[busy] -= moved
    totals[idle] += moved
    return True
