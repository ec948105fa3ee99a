"""What recordings of any length become, by trying few lengths.

A longer recording never has fewer rows: between two lengths that become the same, all do. There are
a few hundred such steps within what a model hears, and several hundred thousand lengths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

__all__ = ["LengthSteps"]


class LengthSteps:
    """A function of lengths that takes few values, in steps; asked for where it is not known.

    Args:
        probe: the function. Equal values of it make a step.
    """

    def __init__(self, probe: Callable[[int], Any]) -> None:
        self._probe = probe
        self._lengths: list[int] = []  # that were tried, rising: the ends of steps
        self._values: list[Any] = []

    def __call__(self, length: int) -> Any:
        """The function's value."""
        at = bisect_left(self._lengths, length)
        around = self._values[max(at - 1, 0) : at + 1]
        if self._lengths[at : at + 1] == [length]:
            return around[-1]
        if len(around) == 2 and at and around[0] == around[1]:
            return around[0]
        value = self._probe(length)
        self._lengths.insert(at, length)
        self._values.insert(at, value)
        for within in (at + 1, at, at - 1):  # what is no end of its step any more
            if 0 < within < len(self._values) - 1 and (
                self._values[within - 1] == self._values[within] == self._values[within + 1]
            ):
                del self._lengths[within], self._values[within]
        return value
