"""Runs steps, some at once and some alone, within a budget, and goes on after each failure."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check_step import (
    FAILED,
    NOT_RUN,
    PASSED,
    REFUSED,
    Outcome,
    Step,
    StepError,
)
from benchmarks.gpu_check.machine import missing
from benchmarks.gpu_check.processes import Ended, run_limited
from benchmarks.gpu_check.record import Record, short_figures

__all__ = ["Runner"]

_REFUSAL = 2  # the exit code of a refusal by name
_LAST_LINES = 25


@dataclass(kw_only=True)
class Runner:
    """What the steps of a check have in common.

    Attributes:
        record: takes the outcomes.
        deadline: on the clock of ``time.monotonic``; nothing runs after it.
        root: where the commands run.
        work: a folder for what they write, each in one of its own.
        environment: of the commands.
        say: shows a line of progress.
        jobs: how many steps run at once.
        total: how many steps there are, for the progress.
    """

    record: Record
    deadline: float
    root: Path
    work: Path
    environment: Mapping[str, str]
    say: Callable[[str], None]
    jobs: int = 1
    total: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run_all(self, steps: Sequence[Step], machine: Mapping[str, Any]) -> None:
        """Run what this machine can: first what runs beside others, then one by one the rest."""
        ready = []
        for step in steps:
            reason = missing(machine, step.needs)
            if reason:
                self._note(step, Outcome(result=NOT_RUN, reason=reason))
            else:
                ready.append(step)
        alone = [step for step in ready if step.alone]
        left = self.deadline - time.monotonic()
        reserve = min(sum(step.expected for step in alone), left / 2)
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                together = [step for step in ready if not step.alone]
                futures = [pool.submit(self.run, step, reserve=reserve) for step in together]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self.stop.set()
                    raise
            for step in alone:
                self.run(step)
        finally:
            for step in ready:
                if step.name not in self.record.outcomes:
                    self._note(step, Outcome(result=NOT_RUN, reason="the check was stopped"))

    def run(self, step: Step, *, reserve: float = 0.0) -> Outcome:
        """Run one step, note its outcome, and leave ``reserve`` seconds of the budget to others."""
        left = self.deadline - reserve - time.monotonic()
        if self.stop.is_set() or left < step.expected:
            reason = "the check was stopped" if self.stop.is_set() else "out of time"
            outcome = Outcome(result=NOT_RUN, reason=reason)
            self._note(step, outcome)
            return outcome
        folder = self.work / step.name
        folder.mkdir(parents=True)
        words = [
            word.replace("{work}", str(folder)).replace("{shared}", str(self.work))
            for word in step.command
        ]
        ended = run_limited(
            [sys.executable, *words],
            limit=min(step.limit, left),
            folder=self.root,
            log=self.record.log_of(step),
            environment=self.environment,
            stopped=self.stop.is_set,
        )
        outcome = judge(step, folder, ended)
        self._note(step, outcome)
        return outcome

    def _note(self, step: Step, outcome: Outcome) -> None:
        with self._lock:
            self.record.add(step, outcome)
            done = len(self.record.outcomes)
            words = "; ".join(
                filter(None, [outcome.reason, short_figures(outcome.figures, step.shown)])
            )
            self.say(
                f"{done:3d}/{self.total}  {step.name:<24} {outcome.result:<8}"
                f"{outcome.seconds:5.0f} s  {words}"
            )


def judge(step: Step, folder: Path, ended: Ended) -> Outcome:
    """What came of a step whose command has ended."""
    lines = [line for line in ended.text.splitlines() if line.strip()][-_LAST_LINES:]
    figures: dict[str, Any] = {}
    result, reason = FAILED, ""
    if ended.reason:
        result = NOT_RUN if ended.reason == "stopped" else FAILED
        reason = f"{ended.reason}, after {ended.seconds:.0f} s"
    elif ended.code == _REFUSAL and step.may_refuse:
        result = REFUSED
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    elif ended.code:
        reason = f"exit code {ended.code}: {lines[-1] if lines else 'no output'}"
    else:
        try:
            figures = step.figures(folder, ended.text) if step.figures else {}
            result, lines = PASSED, []
        except (StepError, OSError, ValueError) as error:
            reason = str(error)
    return Outcome(
        result=result,
        reason=reason,
        seconds=ended.seconds,
        figures=figures,
        last_lines=tuple(lines),
    )
