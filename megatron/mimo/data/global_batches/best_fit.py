"""Packs samples by best fit over a buffer of samples, without a pass over the data.

A sequence begins with the sample that has waited longest in the buffer, so that none waits for
ever, and then takes the longest sample that still fits, until none does.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

__all__ = ["fill_sequence", "packing_efficiency"]


def fill_sequence(lengths: Sequence[int], capacity: int) -> list[int]:
    """The numbers of the samples that make one sequence, in the order in which they are taken.

    Args:
        lengths: of the samples in the buffer, at most ``capacity``; the first has waited longest.
        capacity: tokens of a sequence.
    """
    taken, room = [0], capacity - lengths[0]
    waiting: list[tuple[int, int]] = []
    for number in range(1, len(lengths)):  # of equal lengths the one that has waited longest
        insort(waiting, (lengths[number], -number))
    while waiting:
        at = bisect_right(waiting, (room, 0)) - 1
        if at < 0:
            break
        length, number = waiting.pop(at)
        taken.append(-number)
        room -= length
    return taken


def packing_efficiency(sequences: Sequence[Sequence[int]], capacity: int) -> float:
    """Tokens of samples over places of sequences, from the lengths of the samples in each."""
    return sum(map(sum, sequences)) / (len(sequences) * capacity)
