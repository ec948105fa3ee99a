"""Measures the time from a run's start to its first iteration, phase by phase."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import psutil

__all__ = ["StartClock"]


class StartClock:
    """Adds up the time between marks, by the name of the phase that each mark ends.

    Args:
        begin: of the process, in seconds since the epoch.
    """

    def __init__(self, begin: float) -> None:
        self._begin = self._last = begin
        self._phases: dict[str, float] = {}
        self._is_over = False

    @classmethod
    def of_process(cls) -> StartClock:
        """The clock of this process, which has imported what it needs and read its arguments."""
        clock = cls(psutil.Process().create_time())
        clock.reach("imports and arguments")
        return clock

    def reach(self, phase: str) -> None:
        """Mark the end of a phase; marks after the first iteration are ignored."""
        if self._is_over:
            return
        now = time.time()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def around(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function that builds a chunk of the model, to take its time."""

        @functools.wraps(build, updated=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.reach("process groups")
            chunk = build(*args, **kwargs)
            self.reach("model")
            return chunk

        return timed

    def first_iteration(self) -> str | None:
        """An iteration is over: a line on the way to it, once; then None."""
        if self._is_over:
            return None
        self.reach("first iteration")
        self._is_over = True
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._phases.items())
        return f"{self._last - self._begin:.1f} s to the first iteration: {parts}"
