"""How the rank pool starts beside threads of what it imports, and what it says where it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import statistics
import subprocess
import sys
import textwrap
import threading
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.rank_pool import RankPool
from tests.rank_pool.pages import use_huge_pages
from tests.rank_pool.threads import BusyThreadsError, come_to_rest

REPOSITORY = Path(__file__).resolve().parents[2]

# What libraries leave: a Python thread at a queue, a native one asleep, OpenMP's workers, and one
# thread that will end by itself.
PARKED = """
    import ctypes, queue, threading, time

    threading.Thread(target=queue.Queue().get, name="waiter", daemon=True).start()
    threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
    libc = ctypes.CDLL(None)
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)

    import torch

    torch.set_num_threads(3)
    torch.ones(300, 300).matmul(torch.ones(300, 300))
    torch.ones(10**6).exp().sum()
    torch.set_num_threads(1)
"""
SPINNING = """
    import threading, time

    def spin():
        while True:
            time.sleep(0.0005)

    threading.Thread(target=spin, name="spinner", daemon=True).start()
"""


CONFTEST = """
    import tests.rank_pool
    from tests.conftest import *
    from tests.rank_pool import RankPool

    tests.rank_pool.RankPool = lambda address: RankPool(imports=["imported_by_server"])
"""
TESTS_WITH_RANKS = """
    import os
    import pytest

    def test_without_ranks():
        pass

    @pytest.mark.parametrize("number", range(20))
    def test_with_ranks(ranks, number):
        ranks(1)(os.getpid)
"""


def write(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


def server_of_this_rank() -> int:
    return psutil.Process(os.getppid()).ppid()


def work_in_every_way() -> tuple[float, float, list[str]]:
    """Collectives, kernels, gradients, threads, a library that has not been loaded before."""
    import scipy.fft

    weight = torch.ones(300, 300, requires_grad=True)
    (weight @ torch.ones(300, 300)).sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    said: list[str] = []
    worker = threading.Thread(target=said.append, args=("from a thread",))
    worker.start()
    worker.join()
    return weight.grad.mean().item(), float(scipy.fft.fft([1.0, 2.0])[0].real), said


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RankPool]]:
    """Two at one address, of a server beside idle threads; on Linux alone is there such a name."""
    folder = tmp_path_factory.mktemp("imports")
    write(folder, imported_by_server=PARKED)
    address = f"\0rank-pool-{uuid.uuid4()}" if sys.platform == "linux" else None
    pools = [RankPool(imports=["imported_by_server"], address=address) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        for pool in pools:
            stack.callback(pool.close)
            pool.start()
        yield pools


@pytest.mark.wide
def test_ranks_work_beside_idle_threads_of_the_imports(pools: list[RankPool]) -> None:
    pool = pools[0]
    for _ in range(3):
        assert pool(2)(work_in_every_way) == [(600.0, 3.0, ["from a thread"])] * 2
    assert any("thread 'waiter' of Python" in words for words in pool.threads), pool.threads
    assert sum("native thread" in words for words in pool.threads) >= 3, pool.threads
    assert all(words.endswith("started by imported_by_server") for words in pool.threads)


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="abstract names of sockets are Linux's")
def test_a_server_serves_all_at_its_address_until_the_last_goes(pools: list[RankPool]) -> None:
    (server,) = {psutil.Process(pool(1)(server_of_this_rank)[0]) for pool in pools}
    pools[1].close()
    assert pools[0](2)(server_of_this_rank) == [server.pid] * 2
    pools[0].close()
    assert not server.is_running()


@pytest.mark.wide
def test_a_thread_that_keeps_running_is_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, imported_by_server=SPINNING, conftest=CONFTEST, test_ranks=TESTS_WITH_RANKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    command = [sys.executable, "-m", "pytest", "-ra", f"--rootdir={tmp_path}", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout
    assert "1 passed, 19 skipped, 1 error" in ended.stdout
    body, summary = ended.stdout.split("short test summary info")
    assert body.count("importing imported_by_server left threads: 1 of 1 other threads") == 1
    assert body.count("thread 'spinner' of Python (in spin, ") == 1
    assert "SKIPPED [19]" in summary
    assert len(ended.stdout.splitlines()) < 40, ended.stdout


def test_coming_to_rest_waits_for_a_thread_that_ends() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    spinner = threading.Thread(target=spin, name="spinner")
    spinner.start()
    try:
        with pytest.raises(BusyThreadsError, match=r"thread 'spinner' of Python \(in "):
            come_to_rest(patience=0.1)
        threading.Timer(0.1, stop.set).start()
        assert spinner.native_id not in {left.number for left in come_to_rest(patience=60)}
    finally:
        stop.set()


def fill_and_move() -> tuple[bool, int]:
    content = os.urandom(1 << 12) * (8 << 8)
    memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = content
    moved = use_huge_pages()
    return memory[:] == content, moved


def test_memory_keeps_its_content_in_huge_pages(ranks: RankPool) -> None:
    ((same, moved),) = ranks(1)(fill_and_move)
    assert same
    assert moved % (2 << 20) == 0  # none, where the kernel has no such pages


def references() -> tuple[int, int, bool]:
    """To an inherited object, before and after one more; whether a new object still goes."""
    before = sys.getrefcount(pytest)
    more = [pytest]
    new = {1, 2}
    gone = weakref.ref(new)
    del new
    return before, sys.getrefcount(more[0]), gone() is None


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts are CPython's")
def test_references_to_what_ranks_inherit_are_not_counted(ranks: RankPool) -> None:
    ((before, after, gone),) = ranks(1)(references)
    assert before == after > 1 << 29
    assert gone


def allocate_together() -> float:
    """How many of some blocks that the C library gives lie within a megabyte of each other."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    addresses = [libc.malloc(600) for _ in range(1000)]
    middle = statistics.median(addresses)
    return sum(abs(address - middle) < 1 << 20 for address in addresses) / len(addresses)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="this C library says nothing of its free memory",
)
def test_what_ranks_allocate_lies_together(ranks: RankPool) -> None:
    (share,) = ranks(1)(allocate_together)
    assert share > 0.9


def finalizers_at_exit() -> int:
    class Own:
        pass

    own = Own()
    weakref.finalize(own, print)
    return sum(one.atexit for one in weakref.finalize._registry)  # type: ignore[attr-defined]


def test_ranks_finalize_only_what_they_have_made(ranks: RankPool) -> None:
    assert ranks(1)(finalizers_at_exit) == [1]
