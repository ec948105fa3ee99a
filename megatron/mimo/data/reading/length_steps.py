"""A function of lengths that rises in few steps, known everywhere after few calls.

The number of rows that a recording gives never falls with its length, so that between two lengths
of the same value all have it. Within what a model hears there are several hundred thousand lengths
and a few hundred such steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

__all__ = ["LengthSteps"]


class LengthSteps:
    """Calls a step function only where its value does not follow from earlier calls.

    Args:
        probe: the function.
    """

    def __init__(self, probe: Callable[[int], Any]) -> None:
        self._probe = probe
        self._lengths: list[int] = []  # that were tried, rising: the ends of known steps
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
        for within in (at + 1, at, at - 1):  # drop what is no longer the end of a step
            if 0 < within < len(self._values) - 1 and (
                self._values[within - 1] == self._values[within] == self._values[within + 1]
            ):
                del self._lengths[within], self._values[within]
        return value
