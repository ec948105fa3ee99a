"""A rank that stands still is noticed from outside, named, and ended with its stacks."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.mimo.process import stall
from megatron.mimo.process.board import Board, Slot
from megatron.mimo.process.stacks import STACKS
from megatron.mimo.process.stall import StallWatch
from tests.time_limits import HANG

pytestmark = pytest.mark.slow  # waits

FORK = multiprocessing.get_context("fork")


def _sleep(_: Slot) -> None:
    time.sleep(10 * HANG)


def _stop(_: Slot) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _work(_: Slot) -> None:
    while True:
        pass


def _step(slot: Slot) -> None:
    for iteration in range(1 << 30):
        slot.begin(iteration)
        time.sleep(0.01)


def _wait_for_others(_: Slot) -> None:
    exec(
        compile(
            "import time\ntime.sleep(100000)", "/x/torch/distributed/distributed_c10d.py", "exec"
        )
    )


def _rank(folder: Path, rank: int, phase: str, act: Callable[[Slot], None]) -> None:
    board = Board(folder)
    stacks = board.traceback_file(rank).open("wb", buffering=0)
    faulthandler.register(STACKS, file=stacks, all_threads=True)
    slot = board.take_slot(rank)
    slot.begin(12)
    slot.enter(phase)
    act(slot)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Board]]:
    """Starts ranks that do as they are told; returns their board."""
    processes: list[multiprocessing.process.BaseProcess] = []

    def begin(*acts: tuple[str, Callable[[Slot], None]]) -> Board:
        for rank, (phase, act) in enumerate(acts):
            process = FORK.Process(target=_rank, args=(tmp_path, rank, phase, act))
            process.start()
            processes.append(process)
        board = Board(tmp_path)
        while not all(slot.phase == acts[rank][0] for rank, slot in board.slots().items()) or len(
            board.slots()
        ) < len(acts):
            time.sleep(0.01)
        return board

    yield begin
    for process in processes:
        process.kill()
        process.join()


def watch(
    board: Board, monkeypatch: pytest.MonkeyPatch, *, timeout: float, until: int = 1
) -> tuple[StallWatch, list[str]]:
    """Look until so many lines were said, with a warning after one second in place of twenty."""
    monkeypatch.setattr(stall, "_STILL", 1.0)
    watching = StallWatch(board, timeout, others=False)
    lines: list[str] = []
    end = time.monotonic() + HANG
    while len(lines) < until and time.monotonic() < end:
        lines += watching.look(board.slots())
        time.sleep(0.1)
    return watching, lines


def test_a_rank_that_sleeps_is_warned_of_then_ended_with_its_stacks(
    start: Callable[..., Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = start(("collective", _wait_for_others), ("reading data", _sleep))
    watching, lines = watch(board, monkeypatch, timeout=2.0, until=2)
    assert lines[0].startswith("warning: rank 1 on ")
    assert "has stood still for " in lines[0]
    assert "s in iteration 12, reading data, at " in lines[0]
    assert "test_stall.py:" in lines[0]
    assert lines[0].endswith("in _sleep; it is ended after 2 s (--stall-timeout)")
    assert lines[1].startswith("stacks of rank 1, which stood still:\n")
    assert "in _sleep" in lines[1]
    assert [end.rank for end in watching.ended] == [1]
    assert watching.ended[0].text.startswith("error: rank 1 on ")
    assert board.words()[0].text == watching.ended[0].text
    process = board.slots()[1].process
    end = time.monotonic() + HANG
    while process.lives() and time.monotonic() < end:
        time.sleep(0.01)
    assert not process.lives()
    assert board.slots()[0].process.lives()


def test_a_stopped_rank_is_named_and_ended(
    start: Callable[..., Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = start(("backward", _wait_for_others), ("forward", _stop))
    _, lines = watch(board, monkeypatch, timeout=2.0, until=2)
    assert "in iteration 12, forward, stopped by a signal (kill -CONT lets it go on)" in lines[0]
    assert "rank 1" in lines[0]
    assert "in _stop" in lines[1]


def test_work_and_progress_are_signs_of_life(
    start: Callable[..., Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall, "_STILL", 2.0)
    board = start(("saving", _work), ("forward", _step), ("forward", _wait_for_others))
    watching = StallWatch(board, 3.0, others=False)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        assert watching.look(board.slots()) == []
        time.sleep(0.1)
    assert all(slot.process.lives() for slot in board.slots().values())


def test_ranks_that_all_wait_for_one_another_are_named(
    start: Callable[..., Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    board = start(("forward", _wait_for_others), ("backward", _wait_for_others))
    _, lines = watch(board, monkeypatch, timeout=0, until=2)
    assert sorted(line[:14] for line in lines) == ["warning: rank ", "warning: rank "]
    assert all("waiting for other ranks" in line for line in lines)
    assert all("--stall-timeout" not in line for line in lines)
