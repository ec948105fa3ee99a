"""Large CPU tensors from NumPy's allocator.

Two things make fresh memory cheaper there than from torch's allocator, whose large blocks are
mapped anew each time and filled page by page: NumPy asks the kernel for huge pages, and its zeros
are the kernel's, so that pages nobody writes are never touched. Measured with 4 KiB pages on 2
cores (benchmarks/alignment.py): 32 MiB to be overwritten, 13 ms -> 3 ms; 128 MiB of zeros of which
a tenth is written, 54 ms -> 8 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch


def empty_like_rows(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised tensor of ``shape`` with the dtype and device of ``like``."""
    if like.device.type != "cpu" or type(like) is not torch.Tensor:
        return like.new_empty(shape)
    return _view(np.empty(prod(shape) * like.dtype.itemsize, dtype=np.uint8), shape, like.dtype)


def host_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of ``shape`` on the CPU."""
    return _view(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8), shape, dtype)


def _view(buffer: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(buffer).view(dtype).view(*shape)
