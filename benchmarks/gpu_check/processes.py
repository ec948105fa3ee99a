"""A command in a process of its own that cannot outlive its time, and neither can its children."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "run_limited"]

_LOOK = 0.05  # seconds between two looks at a process
_GRACE = 2.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal; None when it was stopped from here.
        reason: why it was stopped: "time limit" or "stopped"; empty when it ended by itself.
        seconds: how long it ran.
        text: standard output and error.
    """

    code: int | None
    reason: str
    seconds: float
    text: str


def run_limited(
    command: Sequence[str],
    *,
    limit: float,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    stopped: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a command in a session of its own; whatever is left of the session at its end is killed.

    Args:
        command: with its arguments.
        limit: seconds after which it is stopped.
        folder: where it runs.
        log: a file that takes its output.
        environment: all of its environment.
        stopped: asked again and again; True stops it.
    """
    start = time.monotonic()
    reason = ""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not _has_ended(process.pid):
                if stopped():
                    reason = "stopped"
                elif time.monotonic() - start > limit:
                    reason = "time limit"
                if reason:
                    break
                time.sleep(_LOOK)
        finally:
            _end_group(process, gently=bool(reason))
    return Ended(
        code=None if reason else process.returncode,
        reason=reason,
        seconds=time.monotonic() - start,
        text=log.read_text(errors="replace"),
    )


def _has_ended(pid: int) -> bool:
    """Whether the process has ended; it stays a zombie, so that its number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(process: subprocess.Popen[bytes], *, gently: bool) -> None:
    """Kill all that is left of the process's session, and collect the process itself."""
    if gently:
        os.killpg(process.pid, signal.SIGTERM)
        ends = time.monotonic() + _GRACE
        while time.monotonic() < ends and not _has_ended(process.pid):
            time.sleep(_LOOK)
    os.killpg(process.pid, signal.SIGKILL)  # the zombie keeps the group alive: never another's
    process.wait()
