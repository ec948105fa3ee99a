"""Launches of Triton kernels that ask of their arguments only what may have changed.

``kernel[grid](...)`` looks at every argument for what the kernel is compiled for, some 10 us of the
host in the forward pass of a layer that a GPU computes in a few hundred. It returns the compiled
kernel, which launches alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Launcher"]

_ALIGNED = 16  # bytes that Triton tells apart


class Launcher:
    """A kernel whose arguments are tensors, then numbers that change, then what is fixed.

    Args:
        kernel: of ``triton.jit``. It specialises none of the numbers that change.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        changing: tuple[float, ...],
        fixed: tuple[Any, ...],
        **options: int,
    ) -> None:
        """One launch on the current stream.

        Args:
            grid: numbers of programs.
            tensors: on the current device.
            changing: integers below 2^31 and floats, always the same of both.
            fixed: numbers that the kernel may be compiled for: few different ones in a run.
            options: Triton's, decided by ``fixed``.
        """
        places, kinds = 0, []
        for one in tensors:
            places |= one.data_ptr()
            kinds.append(one.dtype)
        key = (fixed, tensors[0].get_device(), *kinds)
        compiled = self._compiled.get(key) if places % _ALIGNED == 0 else None
        if compiled is not None:
            compiled[grid](*tensors, *changing, *fixed)
            return
        compiled = self._kernel[grid](*tensors, *changing, *fixed, **options)
        if places % _ALIGNED == 0 and compiled is not None:  # the interpreter compiles nothing
            self._compiled[key] = compiled
