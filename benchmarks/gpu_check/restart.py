"""SIGTERM saves and the same command continues.

``python -m benchmarks.gpu_check.restart COMMAND ...`` runs a training command without end, of
which ``--output DIR`` is a part, stops it by SIGTERM once it trains, and does the same again.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.reading import read_losses

__all__ = ["restart"]

_TRAINED = 4  # iterations after which a run is stopped
_PATIENCE = 600.0  # seconds; whoever started this stops it earlier


def restart(command: Sequence[str], output: Path) -> dict[str, Any]:
    """Figures of two runs of a command, each stopped by SIGTERM.

    Raises:
        SystemExit: with the reason where something is not as it should be.
    """
    curve = output / "loss.csv"
    first, first_seconds = _train_and_stop(command, curve, after=_TRAINED)
    kept = read_losses(curve)
    if not kept or kept[-1][0] != first:
        sys.exit(f"saved iteration {first}, but loss.csv ends at {kept[-1:]}")
    second, second_seconds = _train_and_stop(command, curve, after=first + _TRAINED)
    losses = read_losses(curve)
    if [number for number, _ in losses] != list(range(1, second + 1)):
        sys.exit(f"iterations 1 to {second} are expected in loss.csv, each once: {losses}")
    if losses[: len(kept)] != kept:
        sys.exit("the second run began anew: losses of the first have changed")
    if not all(math.isfinite(loss) for _, loss in losses):
        sys.exit(f"a loss is not finite: {losses}")
    return {
        "saved_at": [first, second],
        "losses_around_restart": [loss for _, loss in losses[first - 1 : first + 1]],
        "seconds": [round(first_seconds, 1), round(second_seconds, 1)],
    }


def _train_and_stop(command: Sequence[str], curve: Path, *, after: int) -> tuple[int, float]:
    """The iteration that was saved, and seconds."""
    start = time.monotonic()
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and len(read_losses(curve)) < after:
            if time.monotonic() - start > _PATIENCE:
                sys.exit(f"no iteration {after} after {_PATIENCE:.0f} s")
            time.sleep(0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=_PATIENCE)
    finally:
        process.kill()
    sys.stdout.write(said)
    saved = re.search(r"checkpoint of iteration (\d+) in", said)
    if process.returncode or saved is None:
        sys.exit(f"exit code {process.returncode}; expected 0 and a checkpoint after SIGTERM")
    return int(saved[1]), time.monotonic() - start


def main() -> None:
    """Prints the figures as JSON."""
    words = sys.argv[1:]
    output = Path(words[words.index("--output") + 1])
    print(json.dumps(restart([sys.executable, *words], output)), flush=True)


if __name__ == "__main__":
    main()
