"""Why a job has ended: the first of its failures, in one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.mimo.process.board import SlotContent, Word
from megatron.mimo.process.identity import Process
from megatron.mimo.process.stacks import frames_of, innermost

__all__ = ["Cause", "Ending", "cause_of", "describe_exit"]

_TOGETHER = 2.0  # seconds in which the ranks of a launcher end that has ended itself


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A rank's end as it is seen from outside.

    Attributes:
        rank: it.
        pid: its process's number.
        when: on the machine's monotonic clock.
        done: whether it had said that it ends well.
        status: as ``os.waitpid`` gives it; None where nobody could tell.
        text: what to say of it.
    """

    rank: int
    pid: int
    when: float
    done: bool
    status: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The line that says why, and whether it has been printed already."""

    text: str
    printed: bool


def cause_of(
    words: Sequence[Word],
    endings: Sequence[Ending],
    *,
    launcher_ended: float | None,
    launcher: Process | None,
) -> Cause | None:
    """Who failed first; None where every rank ended well, or was asked to end.

    A rank that has lost its connection to another one is to blame only where nobody else is.
    """
    spoken = {word.rank for word in words}
    silent = [
        end
        for end in endings
        if end.rank not in spoken and not (end.done and end.status in (0, None))
    ]
    killed = launcher_ended is not None and any(
        end.status in (signal.SIGKILL, None) and abs(end.when - launcher_ended) < _TOGETHER
        for end in silent
    )
    failures = [(word.when, word.text, word.printed) for word in words if word.kind in _OWN]
    failures += [(_failed_at(end), end.text, False) for end in silent]
    first = min(failures, default=None)
    if killed and launcher_ended is not None and (first is None or launcher_ended <= first[0]):
        assert launcher is not None
        return Cause(
            text=f"error: the launcher (process {launcher.pid}) has ended without a word, and its "
            "ranks with it; the same command continues from the newest checkpoint",
            printed=False,
        )
    if first is None:
        lost = [word for word in words if word.kind == "lost"]
        if not lost:
            return None
        first = (lost[0].when, lost[0].text, lost[0].printed)
    return Cause(text=first[1], printed=first[2])


_OWN = ("failed", "refused")


def _failed_at(end: Ending) -> float:
    """When a rank has failed that has ended without a word.

    A launcher ends the others by SIGTERM once one has failed, and both may be seen at one look:
    a rank that was ended so has failed after those that ended at about the same time.
    """
    asked = end.status is not None and os.WIFSIGNALED(end.status)
    asked = asked and os.WTERMSIG(end.status or 0) == signal.SIGTERM
    return end.when + (_TOGETHER if asked else 0.0)


def describe_exit(slot: SlotContent, status: int | None, stacks: str, *, host: str) -> str:
    """What to say of a rank that has ended without a word.

    Args:
        slot: what it did last.
        status: how it ended; None where nobody could tell.
        stacks: what its interpreter wrote as it crashed; empty where it could not.
        host: the host's name.
    """
    at = slot.where()
    frame = innermost(frames_of(stacks)) if "Fatal Python error" in stacks else None
    if frame is not None:
        at += f", at {frame}"
    return f"error: rank {slot.rank} on {host} (process {slot.process.pid}) {_how(status)} in {at}"


def _how(status: int | None) -> str:
    if status is None:
        return "ended without a word"
    if not os.WIFSIGNALED(status):
        return (
            f"ended with exit code {os.waitstatus_to_exitcode(status)} and without a word "
            "(os._exit)"
        )
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"was killed by {name} (the kernel sends it where memory ends: see dmesg)"
    return f"was ended by {name}"
