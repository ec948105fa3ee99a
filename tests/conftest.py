"""The fixture ``ranks`` and the markers ``gpu`` and ``te``; see ``tests/rank_pool``."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests.rank_pool import RankPool

_POOL = pytest.StashKey[RankPool]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # equality is claimed in fp32, products of TE included
    config.addinivalue_line("markers", "gpu: needs a usable CUDA device; skipped without one")
    config.addinivalue_line("markers", "te: needs Transformer Engine; skipped without it")
    config.stash[_POOL] = RankPool()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch sees no CUDA device"))
    if importlib.util.find_spec("transformer_engine") is None:
        for item in items:
            if item.get_closest_marker("te"):
                item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: not installed"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the pool's imports while tests that do not need it run."""
    if session.config.option.collectonly:
        return
    if any("ranks" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[_POOL].start()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_POOL].close()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> RankPool:
    """``ranks(world_size, timeout=60)(function, *args) -> results by rank``; see ``RankPool``."""
    return pytestconfig.stash[_POOL]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
