"""Summarizes a trace of torch's profiler over a few steps, as one page of text.

All times are nanoseconds of the profiler's clock. Ranges may lie within each other; each counts all
that happens within it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Event", "Summary", "is_part", "summarize"]

STEP = "ProfilerStep#"
RANGES = ("data", "merge", "layers", "loss", "backward", "gradients", "optimizer")
ENCODE = "encode "
_LARGEST = 10
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "hipLaunch", "hipExtLaunch")
_COPIES = ("cudaMemcpy", "cudaMemset", "hipMemcpy", "hipMemset")
# What a device's row of a trace has beside kernels, copies and fills.
_NO_WORK = (" Sync", " Synchronize", " Wait Event")
# On a CPU nothing waits; these are what would, with the tensors on a device.
_WOULD_WAIT = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::bincount")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of a trace.

    Attributes:
        name: of the operator, kernel, call of the driver, or range.
        start, end: when.
        thread: of the host; the same for all that a device does.
        on_device: a kernel, copy or fill of a device.
        is_range: of a name that somebody gave.
        correlation: what a device's event shares with the call that started it.
    """

    name: str
    start: int
    end: int
    thread: int = 0
    on_device: bool = False
    is_range: bool = False
    correlation: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Sums over all steps; times are nanoseconds.

    Attributes:
        steps: how many.
        wall: time of all steps.
        busy: time in which the device did something; None where no device was used.
        launches: of kernels; without a device, calls of operators.
        copies: copies and fills that the host asked the device for.
        waits: call that waits for the device -> occurrences.
        host: range -> its time on the host.
        device: range -> time of what was launched in it, on the device.
        unranged: time on the host in none of the ranges.
        largest: kernel -> (its time, occurrences); without a device, operators, without what they
            call.
    """

    steps: int
    wall: int
    busy: int | None
    launches: int
    copies: int
    waits: Mapping[str, int]
    host: Mapping[str, int]
    device: Mapping[str, int]
    unranged: int
    largest: Mapping[str, tuple[int, int]]

    def text(self, *, title: str, places: Mapping[str, int] | None, processor: str) -> str:
        """A page about the steps, with a line end.

        Args:
            title: the first line.
            places: place in the code -> how often it waited in the step before; None: not seen.
            processor: what is said of the processor where no device was used.
        """
        steps, on_device = self.steps, self.busy is not None
        lines = [f"{title}: {steps} step{'s' * (steps > 1)} of {_ms(self.wall / steps)}"]
        if self.busy is None:
            lines += [processor, f"calls of operators: {self.launches // steps:,} a step"]
        else:
            share = 100 * self.busy / self.wall
            lines.append(f"device busy {share:.1f} % of the time, {_ms(self.busy / steps)} a step")
            copies = f"copies and fills: {self.copies // steps:,}"
            lines.append(f"launches: {self.launches // steps:,} a step; {copies}")
        total = sum(self.waits.values())
        kind = "synchronisations" if on_device else "would wait for a device"
        lines.append(f"{kind}: {total / steps:g} a step" + _named(self.waits, steps))
        if places is None:
            lines.append("  their places are looked for in the step before: begin at a later one")
        for place, number in sorted((places or {}).items(), key=lambda item: -item[1])[:30]:
            lines.append(f"  {number:6d}  {place}")
        lines += ["", *self._ranges(), "", *self._largest()]
        return "\n".join(lines) + "\n"

    def _ranges(self) -> list[str]:
        on_device = self.busy is not None
        head = f"{'time of a step, by range':40}{'host':>12}" + f"{'device':>12}" * on_device
        lines = [head]
        for name, time in [*self.host.items(), ("none of these", self.unranged)]:
            line = f"  {name:38}{_ms(time / self.steps):>12}"
            if on_device and name in self.device:
                line += f"{_ms(self.device[name] / self.steps):>12}"
            lines.append(line)
        return lines

    def _largest(self) -> list[str]:
        kind = "operators" if self.busy is None else "kernels"
        whole = max(self.wall if self.busy is None else self.busy, 1)
        lines = [f"{f'largest {kind}, of a step':40}{'time':>12}{'share':>8}{'calls':>8}"]
        for name, (time, calls) in self.largest.items():
            cells = f"{_ms(time / self.steps):>12}{100 * time / whole:>7.1f}%"
            lines.append(f"  {_short(name, 37):38}{cells}{calls / self.steps:>8g}")
        return lines


def is_part(name: str) -> bool:
    """Whether a range is one that this project names."""
    return name in RANGES or name.startswith(ENCODE)


def summarize(events: Iterable[Event]) -> Summary | None:
    """Sums over the profiled steps; None where the trace has no step."""
    everything = list(events)
    steps = [one for one in everything if one.name.startswith(STEP) and not one.on_device]
    if not steps:
        return None
    first, last = min(one.start for one in steps), max(one.end for one in steps)
    inside = [one for one in everything if first <= one.start and one.start < last]
    kernels = [
        one
        for one in inside
        if one.on_device and not one.is_range and not one.name.endswith(_NO_WORK)
    ]
    calls = [one for one in inside if not one.on_device and not one.is_range]
    ranges = _Ranges(one for one in inside if one.is_range and not one.on_device)
    busy = sum(end - start for start, end in _union((one.start, one.end) for one in kernels))
    launched_at = {one.correlation: one.start for one in calls if _is_driver(one.name)}
    device: Counter[str] = Counter()
    for one in kernels:
        for name in ranges.at(launched_at.get(one.correlation, one.start)):
            device[name] += one.end - one.start
    if kernels:
        launches = sum(one.name.startswith(_LAUNCHES) for one in calls)
        sizes = _sizes((one.name, one.end - one.start) for one in kernels)
    else:
        outermost, own = _operators(calls)
        launches, sizes = outermost, _sizes(own)
    return Summary(
        steps=len(steps),
        wall=last - first,
        busy=busy if kernels else None,
        launches=launches,
        copies=sum(one.name.startswith(_COPIES) for one in calls),
        waits=Counter(
            one.name
            for one in calls
            if _waits(one.name, on_device=bool(kernels))
            # what is read is made on the host, with a device too
            and (kernels or "data" not in ranges.at(one.start))
        ),
        host={name: ranges.time(name) for name in ranges.names},
        device={name: device[name] for name in ranges.names},
        unranged=last - first - ranges.covered(),
        largest=sizes,
    )


@dataclass
class _Ranges:
    """The project's ranges of a trace, in the order in which their names first appear."""

    events: Iterable[Event]
    _by_name: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in sorted(self.events, key=lambda one: one.start):
            if is_part(one.name):
                self._by_name.setdefault(one.name, []).append((one.start, one.end))
        self._by_name = {name: _union(spans) for name, spans in self._by_name.items()}

    @property
    def names(self) -> Sequence[str]:
        return list(self._by_name)

    def at(self, time: int) -> list[str]:
        """The ranges that are open at a time."""
        found = []
        for name, spans in self._by_name.items():
            number = bisect_right(spans, time, key=lambda span: span[0]) - 1
            if number >= 0 and time < spans[number][1]:
                found.append(name)
        return found

    def time(self, name: str) -> int:
        return sum(end - start for start, end in self._by_name[name])

    def covered(self) -> int:
        """Time in which at least one is open."""
        every = [span for spans in self._by_name.values() for span in spans]
        return sum(end - start for start, end in _union(every))


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same times as spans that do not overlap, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _operators(calls: Iterable[Event]) -> tuple[int, list[tuple[str, int]]]:
    """How many operators no other one calls, and each operator's own time."""
    outermost, own = 0, list[tuple[str, int]]()
    by_thread: dict[int, list[Event]] = {}
    for one in calls:
        if "::" in one.name and not one.name.startswith("autograd::"):
            by_thread.setdefault(one.thread, []).append(one)
    for events in by_thread.values():
        ordered = sorted(events, key=lambda one: (one.start, -one.end))
        inner: list[list[int]] = [[] for _ in ordered]  # times of what each calls
        open_ones: list[int] = []
        for number, one in enumerate(ordered):
            while open_ones and ordered[open_ones[-1]].end <= one.start:
                open_ones.pop()
            if open_ones:
                inner[open_ones[-1]].append(one.end - one.start)
            else:
                outermost += 1
            open_ones.append(number)
        own += [
            (one.name, max(one.end - one.start - sum(times), 0))
            for one, times in zip(ordered, inner, strict=True)
        ]
    return outermost, own


def _sizes(times: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """The names with the longest sums: (sum, number)."""
    sums: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for name, time in times:
        sums[name] += time
        numbers[name] += 1
    return {name: (time, numbers[name]) for name, time in sums.most_common(_LARGEST)}


def _is_driver(name: str) -> bool:
    return "::" not in name and name.startswith(("cu", "hip"))


def _waits(name: str, *, on_device: bool) -> bool:
    if not on_device:
        return name in _WOULD_WAIT
    return _is_driver(name) and ("Synchronize" in name or name in ("cudaMemcpy", "hipMemcpy"))


def _named(counts: Mapping[str, int], steps: int) -> str:
    largest = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{name} {number / steps:g}" for name, number in largest]
    return f" ({', '.join(parts)})" if parts else ""


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.2f} ms"


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."
