"""A rank ends with its launcher, a child with its rank, and neither with another process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.mimo.process import parents
from megatron.mimo.process.children import left_to_parent
from megatron.mimo.process.identity import Process
from megatron.mimo.process.parents import find_launcher
from tests.time_limits import HANG, SOON

pytestmark = pytest.mark.slow  # waits

ROOT = Path(__file__).parents[4]
FORK = multiprocessing.get_context("fork")


def _child(bind: Callable[[int], object], parent: int) -> None:
    bind(parent)
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    time.sleep(10 * HANG)


def start_child(bind: str) -> None:
    """A parent that starts a child, which binds itself to it."""
    FORK.Process(target=_child, args=(getattr(parents, bind), os.getpid())).start()
    time.sleep(10 * HANG)


def start_child_in_thread() -> None:
    """A parent whose thread starts a child and ends at once, as the kernel's rule minds."""

    def begin() -> None:
        with left_to_parent():
            FORK.Process(target=_child, args=(lambda _: None, 0), daemon=True).start()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    time.sleep(10 * HANG)


def until_it_ends(process: Process) -> bool:
    end = time.monotonic() + SOON
    while process.lives() and time.monotonic() < end:
        time.sleep(0.01)
    return not process.lives()


def check_that_its_child_ends_with(call: str) -> None:
    """Run one of the above in a process that has no threads yet, so that it may fork."""
    code = f"from {__name__} import *; {call}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = Process.of(int(parent.stdout.readline()))
        time.sleep(1.0)
        assert child.lives()
        parent.kill()
        parent.wait()
        assert until_it_ends(child)


@pytest.mark.parametrize("bind", ["bind_to_parent", "end_with_parent"])
def test_a_process_ends_with_its_parent(bind: str) -> None:
    check_that_its_child_ends_with(f"start_child({bind!r})")


def test_a_child_outlives_the_thread_that_started_it_and_not_the_process() -> None:
    check_that_its_child_ends_with("start_child_in_thread()")


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
