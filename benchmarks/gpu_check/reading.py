"""Reads what a step left behind: its output and its run directory."""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check_step import StepError

__all__ = ["by_length", "json_object", "profile", "tests_passed", "training", "verified"]

_OF_A_PROFILE = {
    "busy_share": r"busy ([\d.]+) %",
    "launches": r"(?:launches|calls of operators): ([\d,]+)",
    "waits": r"(?:synchronisations|would wait for a device): ([\d.]+)",
}
_ENDS = 5  # losses at either end of a curve that are compared


def json_object(folder: Path, text: str) -> dict[str, Any]:
    """The last JSON object that begins on a line of its own."""
    del folder
    decoder, found = json.JSONDecoder(), None
    for match in re.finditer(r"^\{", text, flags=re.MULTILINE):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
    if not isinstance(found, dict):
        raise StepError("the output holds no JSON object")
    return found


def training(folder: Path, text: str) -> dict[str, Any]:
    """The losses and the speed of a run in ``folder/run``; every loss is finite, and they fall."""
    losses = read_losses(folder / "run" / "loss.csv")
    wrong = [number for number, loss in losses if not math.isfinite(loss)]
    if wrong:
        raise StepError(f"the loss of iteration {wrong[0]} is not finite")
    if len(losses) < 2 * _ENDS:
        raise StepError(f"loss.csv has {len(losses)} iterations, expected {2 * _ENDS} or more")
    values = [loss for _, loss in losses]
    first, last = statistics.mean(values[:_ENDS]), statistics.mean(values[-_ENDS:])
    if last >= first:
        raise StepError(f"the loss does not fall: {first:.4f} at first, {last:.4f} at last")
    figures: dict[str, Any] = {"iterations": len(values), "loss_first": first, "loss_last": last}
    speeds = re.findall(r"([\d.]+)([kMG]?) samples/s  [\d.]+[kMG]? tokens/s", text)
    if speeds:  # the progress line: over the last 50 iterations at most
        number, unit = speeds[-1]
        figures["samples_per_s"] = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]
    return figures


def read_losses(path: Path) -> list[tuple[int, float]]:
    """Iterations and losses of a ``loss.csv``; its last line may be cut off."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)[1:]
    cells = [line.split(",") for line in lines if line.endswith("\n")]
    return [(int(number), float(loss)) for number, loss in cells]


def profile(folder: Path, text: str) -> dict[str, Any]:
    """What the page of a profile says of the machine, and that its trace can be read."""
    traces = list((folder / "run").rglob("torch_profile/rank-*.json.gz"))
    if not traces:
        raise StepError("there is no trace")
    with gzip.open(traces[0]) as trace:
        events = json.load(trace)["traceEvents"]
    found: dict[str, Any] = {"events": len(events)}
    for name, pattern in _OF_A_PROFILE.items():
        match = re.search(pattern, text)
        if match:
            found[name] = float(match[1].replace(",", ""))
    return found


def by_length(folder: Path, text: str) -> dict[str, Any]:
    """Milliseconds of both passes of each way to attend, and how many times faster chunks are."""
    found: dict[str, Any] = {}
    for row in json_object(folder, text)["lengths"]:
        figures = {
            f"{way} ms": figures["both"]["ms"]
            for way, figures in row.items()
            if isinstance(figures, dict) and isinstance(figures.get("both"), dict)
        }
        faster = {f"times {way}": times["both"] for way, times in row["times_faster"].items()}
        found[f"{row['tokens']} tokens"] = figures | faster
    return found


def verified(folder: Path, text: str) -> dict[str, Any]:
    """The largest differences that ``verify`` found."""
    del folder
    logits = re.search(r"logits +largest difference ([\d.e+-]+)", text)
    gradients = re.search(r"gradients .*\n +([\d.e+-]+) ", text)
    if logits is None or gradients is None:
        raise StepError("verify said nothing of logits and gradients")
    return {"logits": float(logits[1]), "gradients": float(gradients[1])}


def tests_passed(folder: Path, text: str) -> dict[str, Any]:
    """How many tests passed and were skipped."""
    del folder
    found = {
        word: int(match[1])
        for word in ("passed", "skipped", "failed", "error")
        if (match := re.search(rf"(\d+) {word}", (text.splitlines() or [""])[-1]))
    }
    if not found:
        raise StepError("pytest said nothing of tests")
    return found
