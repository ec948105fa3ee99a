"""Free memory between what the server holds is taken before ranks are forked.

A rank would put what it allocates into these gaps, and copy a page for each: a quarter of the pages
that a short run copies. Without gaps it lies together, at the end of the heap.
"""

from __future__ import annotations

import ctypes

from tests.rank_pool.libc import LIBC

_LARGEST, _SMALLEST = 1 << 17, 24  # bytes of a block; the C library maps larger ones apart


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
            *("fordblks", "keepcost"),
        )
    )


def fill_gaps() -> int:
    """Takes the C library's free blocks for ever, but for the one at the end of the heap.

    Returns:
        How many bytes; 0 where the C library is not glibc, of 2.33 or newer.
    """
    if LIBC is None or not hasattr(LIBC, "mallinfo2"):
        return 0
    LIBC.mallinfo2.restype = _MallocInfo
    LIBC.malloc.restype = LIBC.sbrk.restype = ctypes.c_void_p
    LIBC.malloc.argtypes, LIBC.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    LIBC.malloc_trim(0)
    before = LIBC.mallinfo2().uordblks
    size = _LARGEST
    while size >= _SMALLEST:
        end = LIBC.sbrk(0) - LIBC.mallinfo2().keepcost
        while LIBC.malloc(size) + size <= end:
            pass
        size = size * 7 // 8 if size > 1024 else size - 16
    return int(LIBC.mallinfo2().uordblks - before)
