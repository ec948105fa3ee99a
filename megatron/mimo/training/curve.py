"""The training loss of every iteration, on disk, across restarts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from megatron.mimo.checkpoints.folders import write_text

__all__ = ["LossCurve"]

_HEADER = "iteration,loss"


class LossCurve:
    """``loss.csv`` of a run directory: one line per iteration, floats as ``repr`` writes them.

    Every rank holds the whole curve in ``points``; one rank writes it.
    """

    def __init__(self, path: Path | None, *, writes: bool) -> None:
        self.points: list[tuple[int, float]] = []
        self._path = path
        self._writes = writes
        self._file: TextIO | None = None

    def begin(self, iteration: int) -> None:
        """Start after ``iteration``; lines of later iterations are dropped.

        There are some if a run was killed after its last checkpoint.
        """
        self.close()
        self.points = [point for point in self._read() if point[0] <= iteration]
        if self._path is not None and self._writes:
            lines = [_HEADER, *(f"{number},{loss!r}" for number, loss in self.points)]
            write_text(self._path, "\n".join(lines) + "\n")
            self._file = self._path.open("a", buffering=1)

    def append(self, iteration: int, loss: float) -> None:
        """Write the loss of an iteration; the operating system has it when this returns."""
        self.points.append((iteration, loss))
        if self._file is not None:
            self._file.write(f"{iteration},{loss!r}\n")

    def sync(self) -> None:
        """Make the file as durable as the checkpoint that is about to be written."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; ``points`` stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> list[tuple[int, float]]:
        if self._path is None or not self._path.is_file():
            return []
        points = []
        for line in self._path.read_text(errors="replace").splitlines()[1:]:
            number, _, loss = line.partition(",")
            try:
                points.append((int(number), float(loss)))
            except ValueError:
                break  # the line that was being written when the run was killed
        return points
