"""One step of the check, as a value, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FAILED", "NOT_RUN", "PASSED", "REFUSED", "Outcome", "Step", "StepError"]

PASSED, FAILED, REFUSED, NOT_RUN = "passed", "failed", "refused", "not run"

Figures = dict[str, Any]


class StepError(Exception):
    """A step ended with exit code 0, and what it left behind is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, and how its result is read.

    Attributes:
        name: for ``--only`` and ``--skip``, which take it up to any of its dots.
        title: what is checked, for the table.
        command: what follows the Python interpreter; ``{work}`` is a folder of the step's own,
            ``{shared}`` one of all steps.
        expected: seconds that it takes, roughly; with less time left it is not begun.
        limit: seconds after which it is stopped.
        needs: what the machine must have, by the names of ``machine.missing``.
        alone: nothing else runs beside it.
        may_refuse: a refusal by name (exit code 2) is a result as good as any.
        figures: reads the folder and the output of a command that ended with exit code 0; raises
            ``StepError`` where they are wrong.
        shown: names of the figures that the table shows; all if there are none.
    """

    name: str
    title: str
    command: tuple[str, ...]
    expected: float = 20.0
    limit: float = 90.0
    needs: tuple[str, ...] = ()
    alone: bool = False
    may_refuse: bool = False
    figures: Callable[[Path, str], Figures] | None = None
    shown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        result: PASSED, FAILED, REFUSED or NOT_RUN.
        reason: why, where it is not PASSED.
        seconds: how long it ran.
        figures: what it measured.
        last_lines: of its output, where it failed.
    """

    result: str
    reason: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    last_lines: tuple[str, ...] = ()
