"""The C library, on Linux, loaded before any fork.

dlopen in a child of a process is slow and, after a thread, unsafe.
"""

from __future__ import annotations

import ctypes
import sys

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
