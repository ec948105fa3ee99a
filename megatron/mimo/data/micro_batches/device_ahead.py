"""Copies the next batch to the device while the step computes with the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.mimo.data.micro_batches.broadcast import pack, unpack

__all__ = ["Ahead", "copying_to"]

Arrival = Callable[[], Any]  # makes the device wait for a batch's copy, and returns the batch


class Ahead:
    """Loads and starts to copy each batch before it is asked for.

    Args:
        load: reads the next batch, on the host; may raise, then and in all later calls.
        start: begins to copy a batch, and returns what gives it once it is there.
    """

    def __init__(self, load: Callable[[], Any], start: Callable[[Any], Arrival]) -> None:
        self._load = load
        self._start = start
        self._next: Arrival | None = None

    def __call__(self) -> Any:
        """The next batch.

        Raises:
            Exception: what ``load`` has raised for this batch, even if it raised it earlier.
        """
        arrival = self._next or self._started()
        self._next = None
        batch = arrival()
        self._next = self._started()
        return batch

    def _started(self) -> Arrival:
        try:
            return self._start(self._load())
        except Exception as error:  # noqa: BLE001 - it is raised when the batch is asked for
            return _raising(error)


def _raising(error: Exception) -> Arrival:
    def arrive() -> Any:
        raise error

    return arrive


def copying_to(device: torch.device) -> Callable[[Any], Arrival]:
    """Copies to a GPU on a stream of its own: one copy a batch, from pinned memory."""
    stream = torch.cuda.Stream(device)

    def start(batch: Any) -> Arrival:
        header, body = pack(batch)
        with torch.cuda.stream(stream):
            there = body.pin_memory().to(device, non_blocking=True)

        def arrive() -> Any:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            there.record_stream(computing)  # its memory is not given to others before that
            return unpack(header, there)

        return arrive

    return start
