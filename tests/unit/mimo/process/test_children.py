"""Processes that read data for a rank: signals are not their business, and they end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from megatron.mimo.training.data import MicroBatches, SampleRange, read_batches
from tests.time_limits import HANG, SOON


class _Processes(Dataset[int]):
    """Sample i is the process that reads it; from ``stuck_from`` on, reading never ends."""

    def __init__(self, folder: Path, stuck_from: int) -> None:
        self._folder = folder
        self._stuck_from = stuck_from

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        (self._folder / f"{os.getpid()}").touch()
        if index >= self._stuck_from:
            (self._folder / f"{os.getpid()}.stuck").touch()
            time.sleep(10 * HANG)
        return os.getpid()


def _batches(folder: Path, stuck_from: int = 1000) -> Iterator[Any]:
    dataset = MicroBatches(
        "training",
        _Processes(folder, stuck_from),
        lambda samples: {"pids": torch.tensor(samples)},  # type: ignore[dict-item]
        1,
    )
    return read_batches(
        dataset, SampleRange(start=0, period=None, micro_batch=1, dp_rank=0, dp_size=1), 2
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_leaves_the_readers_at_work(
    tmp_path: Path, number: int
) -> None:
    batches = _batches(tmp_path)
    readers = {int(next(batches)["pids"][0]) for _ in range(4)}
    assert len(readers) == 2
    assert os.getpid() not in readers
    for reader in readers:
        os.kill(reader, number)
    assert {int(next(batches)["pids"][0]) for _ in range(40)} == readers


def test_readers_that_stand_still_are_killed_with_their_rank(tmp_path: Path) -> None:
    def rank() -> None:
        batches = _batches(tmp_path, stuck_from=2)
        next(batches)
        time.sleep(10 * HANG)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    assert process.pid is not None
    readers = _stuck_readers(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _wait_until(lambda: not any(map(_lives, readers)))


def test_readers_that_stand_still_do_not_keep_a_rank_that_ends(tmp_path: Path) -> None:
    def rank() -> None:
        batches = _batches(tmp_path, stuck_from=2)
        next(batches)
        _stuck_readers(tmp_path)
        sys.modules["tests.kept"] = batches  # type: ignore[assignment]  # as a run keeps them

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(SOON)
    assert process.exitcode == 0
    readers = [int(path.stem) for path in tmp_path.glob("*.stuck")]
    _wait_until(lambda: not any(map(_lives, readers)))


def _stuck_readers(folder: Path) -> list[int]:
    _wait_until(lambda: len(list(folder.glob("*.stuck"))) == 2)
    return [int(path.stem) for path in folder.glob("*.stuck")]


def _wait_until(condition: Any) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
