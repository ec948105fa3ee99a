"""A rank ends with its launcher, a child with its rank, and neither with another process."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from megatron.mimo.process.children import left_to_parent
from megatron.mimo.process.identity import Process
from megatron.mimo.process.parents import bind_to_parent, end_with_parent, find_launcher
from tests.time_limits import HANG, SOON

FORK = multiprocessing.get_context("fork")


def _child(bind: Callable[[int], object], parent: int, answer: Connection) -> None:
    bind(parent)
    answer.send(os.getpid())
    time.sleep(10 * HANG)


def _parent(bind: Callable[[int], object], answer: Connection) -> None:
    FORK.Process(target=_child, args=(bind, os.getpid(), answer)).start()
    time.sleep(10 * HANG)


def until_it_ends(process: Process) -> bool:
    end = time.monotonic() + SOON
    while process.lives() and time.monotonic() < end:
        time.sleep(0.01)
    return not process.lives()


@pytest.mark.parametrize("bind", [bind_to_parent, end_with_parent])
def test_a_process_ends_with_its_parent(bind: Callable[[int], object]) -> None:
    mine, theirs = FORK.Pipe()
    parent = FORK.Process(target=_parent, args=(bind, theirs))
    parent.start()
    child = Process.of(mine.recv())
    time.sleep(1.0)
    assert child.lives()
    parent.kill()
    parent.join()
    assert until_it_ends(child)


def _start_in_thread(answer: Connection) -> None:
    """Start a child in a thread that ends at once, as the kernel's rule for parents minds."""

    def begin() -> None:
        with left_to_parent():
            FORK.Process(target=_child, args=(lambda _: None, 0, answer), daemon=True).start()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    time.sleep(10 * HANG)


def test_a_child_outlives_the_thread_that_started_it_and_not_the_process() -> None:
    mine, theirs = FORK.Pipe()
    parent = FORK.Process(target=_start_in_thread, args=(theirs,))
    parent.start()
    child = Process.of(mine.recv())
    time.sleep(1.0)
    assert child.lives()
    parent.kill()
    parent.join()
    assert until_it_ends(child)


def test_a_process_that_a_person_starts_has_no_launcher() -> None:
    assert find_launcher({}) is None
    assert find_launcher({"RANK": "0", "WORLD_SIZE": "2"}) is None
    assert find_launcher({"SLURM_PROCID": "0", "WORLD_SIZE": "1"}) is None  # one task of a step


def test_tasks_of_a_scheduler_end_with_the_process_that_starts_them() -> None:
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        found = find_launcher({name: "0", "WORLD_SIZE": "2"})
        assert found is not None
        assert found.kind == "tasks"
        assert found.process == Process.of(os.getppid())


def test_a_number_that_another_process_has_is_not_the_same_process() -> None:
    own = Process.of(os.getpid())
    assert own.lives()
    assert not Process(pid=own.pid, started="1").lives()
