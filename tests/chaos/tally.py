"""What a campaign counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Tally"]


@dataclass(kw_only=True)
class Tally:
    """The outcomes of one kind of cases.

    Attributes:
        kind: what was tried.
        seconds: how long it took.
        outcomes: how many cases ended how, the failed ones under ``failed``.
        failures: which seed shows a failure, and what happened.
        peak: the largest growth of memory in one process, in bytes.
    """

    kind: str
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak: int = 0

    @property
    def cases(self) -> int:
        """How many were tried."""
        return sum(self.outcomes.values())

    def fail(self, text: str) -> None:
        """Count a case that broke a promise."""
        self.outcomes["failed"] += 1
        self.failures.append(text)

    def __str__(self) -> str:
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        memory = f", {self.peak / 2**20:.0f} MiB at most" if self.peak else ""
        return f"{self.kind}: {self.cases} cases in {self.seconds:.0f} s: {outcomes}{memory}"
