"""Whether this process may be forked beside the threads that it has.

A fork keeps the calling thread alone. What another thread held at that moment stays locked in the
child for ever, but for what is made whole after a fork: malloc (glibc), the interpreter's own
locks, OpenBLAS. A thread that waits, in the kernel, for work or for time hardly ever holds anything
else, and many libraries start such threads when they are imported. So a fork is taken for sound
once every other thread has been seen to sleep for a while; beside a thread that keeps running it
is a matter of luck, and is refused.

What a fork loses is the thread itself: a pool that thinks it has workers waits for them. The ranks'
environment therefore gives numerical libraries one thread, the calling one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")
_PATIENCE = 3.0
_QUIET = 0.003  # gloo's loop, for one, looks around every 10 ms


class BusyThreadsError(RuntimeError):
    """Threads that did not come to rest, each with its name and, for Python's, its place."""


@dataclass(frozen=True, kw_only=True)
class Thread:
    """One thread of this process at one moment.

    Attributes:
        number: the kernel's.
        name: as the kernel has it, which libraries set.
        asleep: it waits in the kernel.
        activity: differs once the thread has run, however shortly.
    """

    number: int
    name: str
    asleep: bool
    activity: tuple[str, ...]


def other_threads() -> list[Thread]:
    """All threads but the calling one, those of C libraries included."""
    if not _TASKS.is_dir():
        return _without_proc()
    numbers = {int(entry) for entry in os.listdir(_TASKS)} - {threading.get_native_id()}
    threads = []
    for number in sorted(numbers):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            threads.append(_look_at(number))
    return threads


def come_to_rest(patience: float = _PATIENCE, quiet: float = _QUIET) -> list[Thread]:
    """Waits until no other thread runs, which costs a process without any nothing.

    Args:
        patience: seconds until it gives up.
        quiet: seconds for which none may have run.

    Returns:
        The threads that are left, all asleep.

    Raises:
        BusyThreadsError: some thread never slept for ``quiet`` seconds while the others did.
    """
    deadline = time.monotonic() + patience
    before = other_threads()
    while before:
        time.sleep(quiet)
        now = other_threads()
        busy = [thread for thread in now if not thread.asleep or thread not in before]
        if not busy:
            return now
        if time.monotonic() > deadline:
            told = "; ".join(describe(thread) for thread in busy)
            raise BusyThreadsError(f"{len(busy)} of {len(now)} other threads keep running: {told}")
        before = now
    return []


def describe(thread: Thread) -> str:
    """``thread 'loop' of Python (in run, /a/b.py)``, ``native thread 'jemalloc_bg_thd'``."""
    for python in threading.enumerate():
        if python.native_id == thread.number:
            frame = sys._current_frames().get(python.ident or 0)
            code = None if frame is None else frame.f_code
            place = "" if code is None else f" (in {code.co_name}, {code.co_filename})"
            return f"thread {python.name!r} of Python{place}"
    return f"native thread {thread.name!r}"


def _look_at(number: int) -> Thread:
    # Fields 14 and 15, counted from 1, are the processor's time; a name may hold blanks.
    fields = (_TASKS / str(number) / "stat").read_text().rpartition(")")[2].split()
    # Last, and its state beside its switches: it may run, and fall asleep, between two readings.
    status = dict(
        line.split(":\t", 1)
        for line in (_TASKS / str(number) / "status").read_text().splitlines()
        if ":\t" in line
    )
    switches = (status.get(f"{kind}voluntary_ctxt_switches", "") for kind in ("", "non"))
    return Thread(
        number=number,
        name=status["Name"],
        asleep=status["State"].startswith("S"),
        activity=(*fields[11:13], *switches),
    )


def _without_proc() -> list[Thread]:
    """Where the kernel does not show a thread's state, every other thread counts as running."""
    import psutil

    me = threading.get_native_id()
    return [
        Thread(number=thread.id, name="?", asleep=False, activity=())
        for thread in psutil.Process().threads()
        if thread.id != me
    ]
