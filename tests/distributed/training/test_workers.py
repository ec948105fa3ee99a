"""Processes that read: one that is killed is the reason, whatever breaks with it."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import resource_sharer
from pathlib import Path

import torch
from torch.utils.data import Dataset

from megatron.mimo.process.failure import describe
from megatron.mimo.training.workers import read_batches
from tests.rank_pool import RankPool
from tests.time_limits import SOON


class Killed(Dataset[dict[str, torch.Tensor]]):
    """Sample 0 is sent; with sample 1 the process loses its connections and, later, its life."""

    def __init__(self, lost: Path) -> None:
        self._lost = lost

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 1:
            sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
            end = time.monotonic() + SOON
            while sharer._listener is None and time.monotonic() < end:
                time.sleep(0.01)  # a thread sends sample 0
            time.sleep(0.1)
            sharer._listener.close()
            self._lost.touch()
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.ones(3)}


def read_the_sent(lost: Path) -> str:
    batches = read_batches(Killed(lost), [0, 1], 1)
    end = time.monotonic() + SOON
    while not lost.exists() and time.monotonic() < end:
        time.sleep(0.01)
    try:
        next(batches)
    except Exception as error:  # noqa: BLE001 - its kind is what is tested
        return describe(error)
    return "nothing was raised"


def test_its_end_is_the_reason_and_not_the_connection_that_it_closed(
    ranks: RankPool, tmp_path: Path
) -> None:
    (said,) = ranks(1)(read_the_sent, tmp_path / "lost")
    assert said.startswith("RuntimeError: DataLoader worker (pid"), said
    assert "killed by signal: Killed" in said


ENDS = """
import os, signal, time
from torch.utils.data import DataLoader, Dataset
from megatron.core.models.mimo.errors import InputError
from megatron.mimo.process.failure import end_run

class Late(Dataset):
    def __getitem__(self, index):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

loader = iter(DataLoader(Late(), sampler=[0], batch_size=None, num_workers=1))
end_run(InputError("the first reason"), 1)
"""


def test_one_that_ends_while_a_rank_says_why_it_fails_does_not_interrupt_it(
    ranks: RankPool, tmp_path: Path
) -> None:
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    (ended,) = ranks.script(1, [script])
    assert ended.exit_code == 1
    assert ended.stderr.startswith("[rank 1] error: the first reason ["), ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
