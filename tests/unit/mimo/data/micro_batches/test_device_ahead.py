from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.mimo.data.micro_batches.device_ahead import Ahead, copying_to


def test_the_next_batch_is_started_before_it_is_asked_for() -> None:
    happened: list[str] = []
    numbers = iter(range(10))

    def load() -> int:
        number = next(numbers)
        happened.append(f"load {number}")
        return number

    def start(number: int) -> Any:
        happened.append(f"start {number}")
        return lambda: number

    ahead = Ahead(load, start)
    assert [ahead(), ahead()] == [0, 1]
    assert happened == [f"{what} {number}" for number in range(3) for what in ("load", "start")]


def test_an_error_comes_with_the_batch_that_it_is_of() -> None:
    def batches() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("broken")

    ahead = Ahead(batches().__next__, lambda number: lambda: number)
    assert [ahead(), ahead()] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        ahead()


@pytest.mark.gpu
def test_batches_arrive_whole_while_the_device_computes() -> None:
    device = torch.device("cuda", 0)
    sent = [torch.randn(1 << 20) + number for number in range(8)]
    numbers = iter(range(8))

    def load() -> dict[str, Any]:
        number = next(numbers)
        return {"values": sent[number], "list": [number, (1, 2)]}

    ahead = Ahead(load, copying_to(device))
    busy = torch.randn(2048, 2048, device=device)
    for number in range(8):
        batch = ahead()
        busy = busy @ busy / 2048
        assert batch["list"] == [number, (1, 2)]
        assert torch.equal(batch["values"].cpu(), sent[number])
