"""Processes that read batches ahead of the step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from megatron.mimo.data.micro_batches.batch import Batch
from megatron.mimo.process.children import left_to_parent, start_reading

__all__ = ["read_batches"]

_ENDS = 2.0  # seconds in which a process that has lost its connections is known to have ended


def read_batches(batches: Dataset[Batch], numbers: Iterable[Any], workers: int) -> Iterator[Batch]:
    """Micro-batches in order, read by ``workers`` processes ahead of time, or by this one.

    Raises:
        RuntimeError: a process that reads has ended; torch says how.
    """
    loader: DataLoader[Batch] = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start_reading if workers > 0 else None,
    )
    if workers == 0:
        return iter(loader)
    with left_to_parent():
        return _Received(iter(loader))


class _Received:
    """Receives from worker processes; reports the end of one, not the connection that it broke."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except (OSError, EOFError):  # the kernel closes files before it tells of the end
            time.sleep(_ENDS)  # in which torch's handler of SIGCHLD raises
            raise
