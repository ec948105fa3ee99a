"""Lengths, media and refusals of many records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.mimo.inspection.seen import Seen

__all__ = ["Bar", "Statistics", "histogram"]

_KEPT = 20  # refusals that are shown in full
_BARS = 12


@dataclass(frozen=True)
class Bar:
    """Values from ``low`` up to, and without, ``high``."""

    low: int
    high: int
    count: int


@dataclass(kw_only=True)
class Statistics:
    """What was counted.

    Attributes:
        lengths: tokens of each sample.
        learned: labels of each sample.
        formats: records of each format.
        media: number of media by modality.
        rows: of each medium, by modality.
        refusals: by kind.
        reasons: of the first ones.
        cut: samples that lost turns.
    """

    lengths: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[int]] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    cut: int = 0

    def add(self, seen: Seen) -> None:
        """Count a record."""
        self.formats[seen.format_ or "of no known format"] += 1
        if seen.refusal is not None:
            self.refusals[seen.refusal.kind] += 1
            if len(self.reasons) < _KEPT:
                self.reasons.append(seen.refusal.reason)
            return
        self.lengths.append(seen.length)
        self.learned.append(seen.learned)
        self.cut += seen.cut_turns > 0
        for modality, rows in seen.rows:
            self.media[modality] += 1
            self.rows.setdefault(modality, []).append(rows)

    def lines(self) -> list[str]:
        """In words."""
        records = len(self.lengths) + self.refusals.total()
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.most_common())
        told = [f"{records} records read: {formats}"]
        if self.lengths:
            told.append(f"tokens per sample: {_spread(self.lengths)}")
            share = 100 * sum(self.learned) / sum(self.lengths)
            told.append(f"labels per sample: {_spread(self.learned)}; {share:.1f} % of all tokens")
        for modality, rows in sorted(self.rows.items()):
            told.append(f"{modality}: {len(rows)} media, rows of each: {_spread(rows)}")
        if self.cut:
            told.append(f"{self.cut} samples lost turns, so as to fit")
        for kind, count in sorted(self.refusals.items()):
            told.append(f"{count} refused: {kind}")
        return told


def histogram(values: Sequence[int], bars: int = _BARS) -> list[Bar]:
    """Counts of values in ranges of equal width."""
    if not values:
        return []
    low, high = min(values), max(values) + 1
    width = max(-(-(high - low) // bars), 1)
    counts = Counter((value - low) // width for value in values)
    last = (high - 1 - low) // width
    return [
        Bar(low + number * width, low + (number + 1) * width, counts[number])
        for number in range(last + 1)
    ]


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    # the least value that 95 % do not exceed
    middle, most = ordered[len(ordered) // 2], ordered[(95 * len(ordered) - 1) // 100]
    mean = sum(ordered) / len(ordered)
    return (
        f"least {ordered[0]}, median {middle}, mean {mean:.0f}, 95 % up to {most}, "
        f"most {ordered[-1]}"
    )
