"""Named ranges of a step, seen where a profiler of torch is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

__all__ = ["named_range"]


def named_range(name: str) -> AbstractContextManager[object]:
    """A range of this name in a profiler's trace; without a profiler, nothing at all.

    torch's own costs microseconds with no profiler about.
    """
    if not torch.autograd._profiler_enabled():
        return nullcontext()
    return record_function(name)
