"""The high-water mark of this process's resident memory, in which every allocator counts."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

__all__ = ["RESETS", "peak_bytes", "reset_peak"]

_LIBC = ctypes.CDLL(None)  # before any fork: to open it in a child of a process is slow and unsafe
_MARKS = Path("/proc/self/clear_refs")
RESETS = _MARKS.exists()
"""Whether the mark can begin anew: on Linux."""


def reset_peak() -> int:
    """Let the mark begin anew, at what is held now, where it can; ``peak_bytes`` after that.

    A fork begins with the mark of what its parent held, and may hold less by now. What the C
    library keeps of freed memory goes back to the system first: to use that again adds nothing.
    """
    with contextlib.suppress(AttributeError):  # another C library than glibc
        _LIBC.malloc_trim(0)
    with contextlib.suppress(OSError):
        _MARKS.write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """The most bytes that this process has held since the mark began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
