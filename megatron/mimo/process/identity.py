"""Which process is which: one that has ended is not mistaken for another that got its number."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Process",
    "ancestors",
    "exit_status",
    "host_name",
    "machine",
    "state",
    "usage",
    "wait_for_end",
]

_STATE, _PARENT, _USER_TIME, _SYSTEM_TIME, _STARTED, _EXIT = 0, 1, 11, 12, 19, -1
_ZOMBIE = "Z"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of this machine.

    Attributes:
        pid: its number.
        started: when it started, in the system's own words; empty where it does not say.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now."""
        fields = _stat(pid)
        return cls(pid=pid, started=fields[_STARTED] if fields else "")

    def lives(self) -> bool:
        """Whether it runs or is stopped; one that has ended and was not waited for does not."""
        fields = _stat(self.pid)
        if fields is not None:
            same = not self.started or fields[_STARTED] == self.started
            return same and fields[_STATE] != _ZOMBIE
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return True


def wait_for_end(process: Process, seconds: float) -> None:
    """Return in the moment in which a process ends, or after so many seconds."""
    end = time.monotonic() + seconds
    handle = None
    with contextlib.suppress(OSError, AttributeError):
        handle = os.pidfd_open(process.pid)
    while process.lives() and time.monotonic() < end:
        if handle is None:
            time.sleep(0.02)
        else:
            select.select([handle], [], [], end - time.monotonic())
    if handle is not None:
        os.close(handle)


def state(pid: int) -> str:
    """R runs, S sleeps, D waits for a device, T is stopped, Z has ended; empty: unknown."""
    fields = _stat(pid)
    return fields[_STATE] if fields else ""


def exit_status(pid: int) -> int | None:
    """How a process ended that nobody has waited for yet, as ``os.waitpid`` gives it."""
    fields = _stat(pid)
    return int(fields[_EXIT]) if fields and fields[_STATE] == _ZOMBIE else None


def usage(pid: int) -> tuple[float, int] | None:
    """Seconds of CPU and bytes read and written so far; None where the system does not say."""
    fields = _stat(pid)
    if fields is None:
        return None
    ticks = int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
    moved = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines()[:2]:
            moved += int(line.split()[1])
    return ticks / os.sysconf("SC_CLK_TCK"), moved


def ancestors(limit: int = 3) -> list[tuple[Process, list[str]]]:
    """This process's parent, its parent and so on, with their command lines where readable."""
    found: list[tuple[Process, list[str]]] = []
    pid = os.getppid()
    while pid > 0 and len(found) < limit:
        words: list[str] = []
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        found.append((Process.of(pid), words))
        fields = _stat(pid)
        pid = int(fields[_PARENT]) if fields else 0
    return found


def host_name() -> str:
    """What people call this host."""
    return socket.gethostname()


@functools.cache
def machine() -> str:
    """Where process numbers mean the same: this host since its start, or a container of it."""
    parts = [host_name()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _stat(pid: int) -> list[str] | None:
    """The fields behind a process's name in Linux's ``/proc/PID/stat``; None without it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
