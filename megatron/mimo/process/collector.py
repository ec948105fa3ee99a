"""Keeps the garbage collector away from imported modules, which stay for good."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Exempt everything that is made in this context, modules above all, from collection.

    Looking through a million objects of modules again and again takes two of the six seconds in
    which a process starts.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # what counts its objects as the interpreter ends would call them leaked
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
        if collects:
            gc.enable()
