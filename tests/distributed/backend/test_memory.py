"""Memory that a process on the CPU frees comes back without a fault for each page."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import sysconfig

import pytest

from tests.rank_pool import RankPool

ROUNDS, BLOCKS, SIZE = 5, 4, 16 << 20  # bytes; more than glibc would leave at the end of its heap


def faults() -> int:
    """Of rounds in which blocks are allocated, written and freed, after a first one."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def one_round() -> None:
        blocks = [libc.malloc(SIZE) for _ in range(BLOCKS)]
        for block in blocks:
            libc.memset(block, 1, SIZE)
        for block in blocks:
            libc.free(block)

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
    assert found < SIZE / os.sysconf("SC_PAGE_SIZE")  # one block of the twenty
