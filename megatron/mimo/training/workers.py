"""Processes that read batches ahead of the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from megatron.mimo.data.batch import Batch
from megatron.mimo.process.children import left_to_parent, start_reading

__all__ = ["read_batches"]


def read_batches(batches: Dataset[Batch], numbers: Iterable[Any], workers: int) -> Iterator[Batch]:
    """Micro-batches in order, read by ``workers`` processes ahead of time, or by this one."""
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
        return iter(loader)
