"""Memory that a process on the CPU frees comes back without a fault for each page."""

from __future__ import annotations

import os
import resource
import sys
import sysconfig

import pytest
import torch

from tests.rank_pool import RankPool

ROUNDS, BLOCKS, SIZE = 5, 4, 16 << 20  # bytes; more than glibc would leave at the end of its heap


def faults() -> int:
    def one_round() -> None:
        blocks = [torch.ones(SIZE // 4) for _ in range(BLOCKS)]
        del blocks

    one_round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        one_round()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or "musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or ""),
    reason="only glibc gives memory back",
)
@pytest.mark.skipif(
    any(
        map(os.environ.get, ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    ),
    reason="the environment says what malloc does",
)
def test_freed_memory_is_kept(ranks: RankPool) -> None:
    (found,) = ranks(1)(faults)
    assert found < BLOCKS * SIZE / os.sysconf("SC_PAGE_SIZE")  # of one round of the five
