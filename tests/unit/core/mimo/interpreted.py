"""Triton's kernels in Triton's interpreter, on the CPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

KERNELS = "megatron.core.models.mimo.alignment.row_kernels"


@contextmanager
def interpreted(module: str) -> Iterator[Any]:
    """A module of kernels, interpreted while the block runs; as it was before it afterwards.

    Triton decides when a kernel is decorated, so the module is imported anew; Triton's own
    functions that kernels call were decorated when Triton was imported.
    """
    import triton.language
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    before, loaded = os.environ.get("TRITON_INTERPRET"), sys.modules.pop(module, None)
    own = {name: one for name, one in vars(triton.language).items() if isinstance(one, JITFunction)}
    os.environ["TRITON_INTERPRET"] = "1"
    take_numbers_for_bounds()
    vars(triton.language).update({name: InterpretedFunction(one.fn) for name, one in own.items()})
    try:
        yield importlib.import_module(module)
    finally:
        vars(triton.language).update(own)
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        sys.modules.pop(module, None)
        if loaded is not None:
            sys.modules[module] = loaded


@contextmanager
def interpreted_kernels() -> Iterator[Any]:
    """The row kernels, interpreted while the block runs."""
    from megatron.core.models.mimo.alignment import row_index

    row_index._kernels.cache_clear()
    try:
        with interpreted(KERNELS) as kernels:
            assert row_index._kernels() is kernels
            assert kernels.INTERPRETED
            yield kernels
    finally:
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
