"""Triton's kernels in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

KERNELS = "megatron.core.models.mimo.alignment.row_kernels"


@contextmanager
def interpreted_kernels() -> Iterator[Any]:
    """The row kernels, interpreted while the block runs; as they were before it afterwards.

    Triton decides when a kernel is decorated, so their module is imported anew.
    """
    from megatron.core.models.mimo.alignment import row_index

    before, loaded = os.environ.get("TRITON_INTERPRET"), sys.modules.pop(KERNELS, None)
    row_index._kernels.cache_clear()
    os.environ["TRITON_INTERPRET"] = "1"
    take_numbers_for_bounds()
    try:
        kernels = row_index._kernels()
        assert kernels is not None
        assert kernels.INTERPRETED
        yield kernels
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        sys.modules.pop(KERNELS, None)
        if loaded is not None:
            sys.modules[KERNELS] = loaded
        row_index._kernels.cache_clear()


@cache
def take_numbers_for_bounds() -> None:
    """Let the interpreter count a loop whose bound is no constant, whatever Triton's version.

    Triton 3.6, of torch 2.11, takes `int` of an array of one element, which numpy 2.5 refuses.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
