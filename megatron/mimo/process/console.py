"""What a person sees of a run: one line of progress, rewritten in place on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

__all__ = ["Console", "Pace", "format_count", "format_duration", "format_progress"]

_WINDOW = 50  # iterations over which speed is averaged
_REDRAW = 0.1  # seconds between two rewrites of the line on a terminal


def format_duration(seconds: float) -> str:
    """``"42 s"``, ``"3:05"`` (minutes), ``"2:03:05"`` (hours)."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(value: float) -> str:
    """Three significant digits: ``"7.31"``, ``"412"``, ``"19.8k"``, ``"1.20M"``."""
    for limit, suffix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G")):
        if value < limit * 0.9995:
            scaled = value / (limit / 1e3)
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.2e}"


def format_progress(
    *,
    iteration: int,
    total: int,
    loss: float | None,
    samples_per_second: float,
    figures: Sequence[str] = (),
    seconds_left: float,
    extra: Mapping[str, str] | None = None,
) -> str:
    """The progress line, without a line end; ``figures`` are what else is known of the speed."""
    width = len(str(total))
    parts = [f"iteration {iteration:{width}d}/{total}"]
    parts.append("loss -" if loss is None else f"loss {loss:.4f}")
    parts += [f"{name} {value}" for name, value in (extra or {}).items()]
    parts.append(f"{format_count(samples_per_second)} samples/s")
    parts += figures
    parts.append(f"ETA {format_duration(seconds_left)}")
    return "  ".join(parts)


class Pace:
    """Seconds spent in training iterations, and the speed of the last ones.

    What happens between ``pause`` and ``resume`` (evaluation, saving) does not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._since = time.monotonic()
        self._carried = 0.0

    def start(self) -> None:
        """Begin to count: training starts now."""
        self._since, self._carried = time.monotonic(), 0.0

    def step(self, samples: int) -> None:
        """An iteration of ``samples`` samples has ended."""
        now = time.monotonic()
        seconds = self._carried + now - self._since
        self._since, self._carried = now, 0.0
        self.seconds += seconds
        self.samples += samples
        self._recent.append((seconds, samples))

    def pause(self) -> None:
        """Stop the clock within an iteration."""
        self._carried += time.monotonic() - self._since

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._since = time.monotonic()

    @property
    def samples_per_second(self) -> float:
        """Speed over the last iterations; 0 before the first."""
        seconds = sum(part for part, _ in self._recent)
        return sum(count for _, count in self._recent) / seconds if seconds else 0.0

    @property
    def seconds_per_iteration(self) -> float:
        """Mean over the last iterations; 0 before the first."""
        count = len(self._recent)
        return sum(part for part, _ in self._recent) / count if count else 0.0


class Console:
    """Writes messages and the progress line; silent unless ``active`` (rank 0).

    On a terminal the progress line is rewritten in place and messages appear above it. Elsewhere
    each call is a plain line.
    """

    def __init__(self, *, active: bool, stream: TextIO | None = None) -> None:
        self._active = active
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._line = ""
        self._drawn = 0.0

    def say(self, message: str) -> None:
        """Print a message on a line of its own."""
        if not self._active:
            return
        self._write(("\r\x1b[K" if self._line else "") + message + "\n" + self._line)

    def progress(self, line: str, *, milestone: bool) -> None:
        """Show the progress line.

        Args:
            line: the text, without a line end.
            milestone: print it even where lines cannot be rewritten.
        """
        if not self._active:
            return
        if not self._terminal:
            if milestone:
                self._write(line + "\n")
            return
        now = time.monotonic()
        if milestone or now - self._drawn >= _REDRAW:
            self._drawn = now
            self._line = line[: shutil.get_terminal_size().columns - 1]
            self._write("\r\x1b[K" + self._line)

    def end_progress(self) -> None:
        """Leave the progress line standing and go to the next one."""
        if self._active and self._line:
            self._write("\n")
        self._line = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            self._active = False  # the reader (`| head`) has gone; training goes on
