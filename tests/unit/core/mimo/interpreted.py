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
    """A module of kernels, interpreted while the block runs; all is as it was before it afterwards.

    Triton decides when a kernel is decorated, so the module is imported anew. Triton's own
    functions that kernels call were decorated when Triton was imported; where they are called in
    the interpreter, it leaves Triton's language as it needs it itself.
    """
    import triton.language as tl
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    package = importlib.import_module(module.rpartition(".")[0])
    before, loaded = os.environ.get("TRITON_INTERPRET"), sys.modules.pop(module, None)
    language = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    with _attributes_kept(package, *language):
        take_numbers_for_bounds()
        own = {name: one for name, one in vars(tl).items() if isinstance(one, JITFunction)}
        vars(tl).update({name: InterpretedFunction(one.fn) for name, one in own.items()})
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            yield importlib.import_module(module)
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
            sys.modules.pop(module, None)
            if loaded is not None:
                sys.modules[module] = loaded


@contextmanager
def _attributes_kept(*owners: Any) -> Iterator[None]:
    """Modules and classes have the attributes afterwards that they have now."""
    kept = [(one, dict(vars(one))) for one in owners]
    try:
        yield
    finally:
        for owner, attributes in kept:
            for name, value in list(vars(owner).items()):
                if name not in attributes:
                    delattr(owner, name)
                elif value is not attributes[name]:
                    setattr(owner, name, attributes[name])


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
