"""The fixture ``ranks`` (see ``rank_pool``), the markers ``gpu`` and ``te`` (``gpu_session``), and
the tiers of the suite: ``wide`` (see ``tiers``) is left out by default, ``slow`` by make test-fast.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests import gpu_session, tiers
from tests.gpu_session import GpuSession

if TYPE_CHECKING:
    from tests.rank_pool import RankPool

_POOL = pytest.StashKey["RankPool"]()
_GPU = pytest.StashKey[GpuSession]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the tests that need a GPU or Transformer Engine, and no others, in this process",
    )
    parser.addoption(
        "--wide",
        action="store_true",
        help="run the wide tier too, of which each kind is run anyway: make test-all",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes ``-n auto`` runs tests in; none beside this one where there is a GPU.

    Each takes some 1.5 GB with its ranks, and tests with two ranks want two cores.
    """
    if config.option.gpu or gpu_session.has_driver():
        return 0
    return max(1, min(len(os.sched_getaffinity(0)), 4))


def pytest_configure(config: pytest.Config) -> None:
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # equality is claimed in fp32, products of TE included
    config.addinivalue_line("markers", "slow: takes many seconds; make test-fast leaves it out")
    config.addinivalue_line("markers", "wide: runs with --wide, or where it is named by its id")
    config.addinivalue_line("markers", "gpu: needs a usable CUDA device; skipped without one")
    config.addinivalue_line(
        "markers", "te: needs Transformer Engine on such a device; skipped without it"
    )
    if _tests_elsewhere(config):
        return
    gc.disable()  # until all is imported: a fifth of the time
    # where tests run alone: they take seconds, in which the processes that test could start
    from megatron.mimo.backend import select_backend
    from tests.rank_pool import RankPool

    if not config.option.gpu and not gpu_session.has_driver():
        select_backend("cpu")  # before Megatron is imported, which then leaves torch's compiler out
    config.stash[_POOL] = pool = RankPool(address=_shared_address(config))
    if hasattr(config, "workerinput"):
        pool.start()  # while tests are collected: all processes would wait for the first ranks
    if not config.option.gpu:
        config.stash[_GPU] = GpuSession(config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.wide:
        left_out = tiers.left_out(items, config.args, config.option.markexpr)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # They wait, when all others would for the ranks' server; and what ends a run is short.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    special = [item for item in items if gpu_session.needs_gpu(item)]
    if config.option.gpu:
        others = [item for item in items if item not in special]
        config.hook.pytest_deselected(items=others)
        items[:] = special
        gpu_session.mark_skips(special, gpu=bool(special) and gpu_session.has_gpu())
    elif gpu_session.has_driver():
        items.sort(key=gpu_session.needs_gpu)  # a session of their own comes last
    else:
        gpu_session.mark_skips(special, gpu=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the pool's imports while tests that do not need it run."""
    gc.freeze()  # what was imported stays, and need not be looked through again and again
    gc.enable()
    if session.config.option.collectonly:
        return
    if any(_needs_ranks(item) for item in session.items):
        session.config.stash[_POOL].start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> object:
    """Hands a test that needs a GPU to the session that sees it."""
    gpu = item.config.stash.get(_GPU, None)
    if gpu is None or not gpu_session.needs_gpu(item) or not gpu_session.has_driver():
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    items = item.session.items
    for report in gpu.reports(item, items[items.index(item) :]):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Says why there are no ranks with the first test that needs them, and only there."""
    from tests.rank_pool import RanksFailedError

    pool = item.config.stash[_POOL]
    if _needs_ranks(item):
        if pool.failure is not None:
            pytest.skip("there are no ranks: the first error of a test with ranks says why")
        with contextlib.suppress(RanksFailedError):
            pool.wait_until_ready()
        if pool.failure is not None:
            pytest.fail(f"the rank pool cannot serve: {pool.failure}", pytrace=False)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Names the threads beside which ranks were forked, for where something went wrong."""
    threads = config.stash[_POOL].threads if _POOL in config.stash else []
    if threads and terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"ranks were forked beside idle threads: {'; '.join(threads)}")


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # what counts its objects as the interpreter ends would call them leaked
    if _POOL in config.stash:
        config.stash[_POOL].close()
    if _GPU in config.stash:
        config.stash[_GPU].close()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> RankPool:
    """``ranks(world_size, timeout=60)(function, *args) -> results by rank``; see ``RankPool``."""
    return pytestconfig.stash[_POOL]


def _tests_elsewhere(config: pytest.Config) -> bool:
    """Whether this process hands all tests to those of pytest-xdist."""
    return getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")


def _shared_address(config: pytest.Config) -> str | None:
    """Where the processes of pytest-xdist find one rank pool's server: ten seconds to start."""
    if sys.platform != "linux" or not hasattr(config, "workerinput"):
        return None
    return f"\0rank-pool-{config.workerinput['testrunuid']}"


def _needs_ranks(item: pytest.Item) -> bool:
    return "ranks" in getattr(item, "fixturenames", ())
