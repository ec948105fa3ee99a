"""What is written of a check: its results after every step, and what steps print as they do."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check_step import NOT_RUN, Outcome, Step

__all__ = ["Record", "short_figures"]

_PACKAGES = ("torch", "megatron-core", "transformer_engine", "apex", "transformers")
_SHOWN = 160  # characters of a reason in the table


class Record:
    """The files of a check in a folder, which are worth reading whenever the check is cut off.

    ``gpu_check.jsonl`` gets a line for each step that has ended, ``gpu_check.json`` and
    ``gpu_check.md`` are whole after each, ``logs/STEP.log`` is written by the step itself.
    """

    def __init__(self, folder: Path, *, command: str, budget: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.lines, self.table = (
            folder / f"gpu_check.{ending}" for ending in ("json", "jsonl", "md")
        )
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.lines.write_text("")
        self.machine: dict[str, Any] = {}
        self.outcomes: dict[str, tuple[Step, Outcome]] = {}
        self._command = command
        self._budget = budget
        self._start = time.monotonic()
        self._date = time.strftime("%Y-%m-%d %H:%M:%S %z")

    def add(self, step: Step, outcome: Outcome) -> None:
        """Note the outcome of a step and write everything."""
        self.outcomes[step.name] = (step, outcome)
        with self.lines.open("a") as lines:
            lines.write(json.dumps(_values(step, outcome), default=str) + "\n")
        self.write()

    def log_of(self, step: Step) -> Path:
        """The file that takes what the step prints."""
        return self.logs / f"{step.name}.log"

    def write(self) -> None:
        """Write the JSON and the table; each file is complete at any time."""
        _replace(self.json, json.dumps(self._content(), indent=1, default=str) + "\n")
        _replace(self.table, self._markdown())

    def _content(self) -> dict[str, Any]:
        return {
            "format": 1,
            "date": self._date,
            "command": self._command,
            "budget_s": self._budget,
            "seconds": round(time.monotonic() - self._start, 1),
            "machine": self.machine,
            "steps": [_values(*pair) for pair in self.outcomes.values()],
        }

    def _markdown(self) -> str:
        ran = [pair for pair in self.outcomes.values() if pair[1].result != NOT_RUN]
        left = [pair for pair in self.outcomes.values() if pair[1].result == NOT_RUN]
        lines = [
            f"`{self._command}`, {self._date[:10]}, {time.monotonic() - self._start:.0f} s. "
            f"{_machine_line(self.machine)}",
            "",
            "| step | what | result | figures | s |",
            "|---|---|---|---|---|",
        ]
        for step, outcome in ran:
            words = short_figures(outcome.figures, step.shown)
            if outcome.reason:
                words = "; ".join(filter(None, [outcome.reason[:_SHOWN], words]))
            lines.append(
                f"| `{step.name}` | {_cell(step.title)} | {outcome.result} | {_cell(words)} "
                f"| {outcome.seconds:.0f} |"
            )
        if left:
            lines += ["", "Not run:", ""]
            lines += [f"- `{step.name}` ({step.title}): {one.reason}" for step, one in left]
        return "\n".join(lines) + "\n"


def _values(step: Step, outcome: Outcome) -> dict[str, Any]:
    return {
        "name": step.name,
        "title": step.title,
        "result": outcome.result,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 1),
        "figures": dict(outcome.figures),
        "command": list(step.command),
        "last_lines": list(outcome.last_lines),
    }


def short_figures(figures: Mapping[str, Any], shown: Collection[str] = ()) -> str:
    """Figures in one line, those that ``shown`` names if it names any; nested ones by group."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            nested = short_figures(value, shown)
            parts.append(f"{name}: {nested}" if nested else "")
        elif not shown or name in shown:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{name} {text}")
    return ", ".join(part for part in parts if part)


def _machine_line(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "Nothing is known of the machine."
    device = machine.get("gpu") or "no GPU"
    memory = f", {machine['memory_gib']} GiB" if machine.get("memory_gib") else ""
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    versions = ", ".join(
        f"{name} {machine.get('packages', {}).get(name) or 'absent'}" for name in _PACKAGES
    )
    return f"{device}{memory}{driver}; Python {machine.get('python')}; {versions}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
