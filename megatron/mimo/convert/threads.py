"""Work that several threads share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

__all__ = ["default_threads", "in_threads"]


def default_threads() -> int:
    """How many threads read and write."""
    return min(4, os.cpu_count() or 1)


def in_threads[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None
) -> list[Result]:
    """Results of a function, in no particular order; after an error no further item is begun."""
    # After a fork torch makes its own pool of threads anew when it is first asked for it, which
    # several threads at once must not do.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in as_completed(futures)]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
