"""Process trees: nothing that a rank started outlives its run."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from tests.rank_pool.libc import LIBC

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Linux: descendants whose parent dies become children of this process, not of init."""
    if LIBC is not None:
        LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Linux: the kernel kills this process when the one that forked it dies."""
    if LIBC is not None:
        LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def send_signal(pid: int, number: int) -> None:
    """Signals one process; one that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def sweep(leaders: list[int], grace: float) -> None:
    """Ends everything that descends from this process, ``leaders``' process groups included.

    What still runs gets ``grace`` seconds first: multiprocessing's resource tracker removes named
    semaphores once it sees that its owner has gone.
    """
    deadline = time.monotonic() + grace
    while _living_descendants() and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in leaders:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    for process in _living_descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _reap()


def _living_descendants() -> list[psutil.Process]:
    """Looks at every process of the machine, but where this one has no child at all."""
    living: list[psutil.Process] = []
    if not _reap():
        return living
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _reap() -> bool:
    """Waits for children that have ended; whether others are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
