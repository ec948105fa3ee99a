"""Measures the progress and the speed of a conversion."""

from __future__ import annotations

import sys
import threading
import time

__all__ = ["Meter"]

_INTERVAL = 0.2  # seconds between two drawings of the bar
_WIDTH = 30


class Meter:
    """Counts bytes, from any thread; draws a bar where standard error is a terminal.

    Args:
        title: what is being done ("import").
        total: bytes there are.
        shown: False for silence.
    """

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        self._title = title
        self._total = max(total, 1)
        self._done = 0
        self._began = time.perf_counter()
        self._drawn = 0.0
        self._lock = threading.Lock()
        self._draws = shown and sys.stderr.isatty()

    def add(self, size: int) -> None:
        """Count what was converted."""
        with self._lock:
            self._done += size
            now = time.perf_counter()
            if self._draws and now - self._drawn > _INTERVAL:
                self._drawn = now
                filled = round(_WIDTH * min(1.0, self._done / self._total))
                bar = "#" * filled + "." * (_WIDTH - filled)
                sys.stderr.write(f"\r{self._title} [{bar}] {self.summary()} ")
                sys.stderr.flush()

    def end(self) -> str:
        """Remove the bar; return what there is to say."""
        if self._draws:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        return self.summary()

    def summary(self) -> str:
        """Size, time and rate so far."""
        seconds = time.perf_counter() - self._began
        size = f"{self._done / 1e9:.2f} GB" if self._done >= 1e7 else f"{self._done / 1e6:.2f} MB"
        return f"{size} in {seconds:.1f} s ({self._done / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
