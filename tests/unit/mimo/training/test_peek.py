"""Micro-batches that are seen before they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.mimo.training.data import BatchIterator
from megatron.mimo.training.throughput import ThroughputMeter


class Numbers(Iterator[Any]):
    """Batches with their numbers; the third cannot be read."""

    def __init__(self) -> None:
        self.read = 0

    def __next__(self) -> dict[str, Any]:
        self.read += 1
        if self.read == 3:
            raise OSError("the third")
        return {"number": self.read}


def test_what_is_seen_is_what_is_taken_and_an_error_waits_for_its_turn() -> None:
    numbers = Numbers()
    batches = BatchIterator(
        lambda: numbers,
        group=dist.ProcessGroup(0, 1),
        device=torch.device("cpu"),
        keep=lambda batch: batch,
    )
    (first,) = batches.peek(1)
    assert [batch["number"] for batch in batches.peek(4)] == [1, 2]
    assert next(batches) is first
    (second,) = batches.peek(1)
    assert next(batches) is second
    assert batches.peek(2) == []
    with pytest.raises(OSError, match="the third"):
        next(batches)
    assert next(batches)["number"] == 4


def test_what_is_seen_is_counted_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    meter = ThroughputMeter([])
    monkeypatch.setattr(meter, "_see", lambda batch: counted.append(batch["number"]))
    batches = BatchIterator(
        lambda: iter([{"number": 1}, {"number": 2}]),
        group=dist.ProcessGroup(0, 1),
        device=torch.device("cpu"),
        keep=lambda batch: batch,
        meter=meter,
    )
    assert len(batches.peek(2)) == 2
    assert counted == []
    next(batches)
    assert counted == [1]
