"""Imports Megatron for commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.mimo.process.collector import uncollected
from megatron.mimo.process.quiet import quiet_imports

__all__ = ["importing_megatron"]


@contextmanager
def importing_megatron() -> Iterator[None]:
    """Import Megatron within this context: without warnings, and once the backend is selected.

    On a CPU Megatron then leaves torch's compiler out, which takes two seconds.
    """
    with quiet_imports(), uncollected():
        # imports torch, whose threads the caller has set before
        from megatron.mimo.backend import select_backend

        select_backend()
        yield
