"""Huge pages for the memory that ranks inherit.

A fork copies an entry for each page and the child's end frees it again: for 600 MB of 4 kB pages
that is most of what a short run costs, and a child writes to few of them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from tests.rank_pool.libc import LIBC

_MAPS = Path("/proc/self/maps")
_HUGE = 1 << 21
_MADV_COLLAPSE = 25  # since Linux 6.1


def use_huge_pages() -> int:
    """Moves this process's anonymous memory into huge pages, as far as the kernel can.

    Returns:
        How many bytes lie in them now; 0 where the kernel has none or cannot move a page.
    """
    if LIBC is None or not _MAPS.is_file():
        return 0
    moved = 0
    for start, end in _anonymous():
        for address in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
            done = LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(_HUGE), _MADV_COLLAPSE)
            moved += _HUGE if done == 0 else 0
    return moved


def _anonymous() -> list[tuple[int, int]]:
    """First and past-the-last address of what this process may write and no file stands behind."""
    areas = []
    for line in _MAPS.read_text().splitlines():
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in addresses.split("-"))
            areas.append((start, end))
    return areas
