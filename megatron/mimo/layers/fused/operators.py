"""Operators of this project as torch knows them: what they take, and who computes them where.

On a GPU each is one launch of a Triton kernel (:mod:`~megatron.mimo.layers.fused.kernels`), on the
CPU, and where Triton is not installed, plain torch, which says what the kernel has to compute. To
torch each is one operation, so that dispatch modes count what a GPU is asked for, on any machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["apply_of", "define", "has_triton", "launched"]

_LIBRARY = torch.library.Library("megatron_mimo", "DEF")


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled for a GPU."""
    return importlib.util.find_spec("triton") is not None


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, of tensors and constants by their places.

    In torch 2.11 it is Python, which looks at every argument for what is left of a transform of
    functorch: some 4 us of the host for each call, where none is active.
    """
    if "apply" not in vars(torch.autograd.Function):
        apply: Callable[..., Any] = function.apply
        return apply

    def call(*given: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*given)
        return below.apply(*given)

    below: Any = super(torch.autograd.Function, function)
    return call


def launched(name: str, module: str = "kernels") -> Callable[..., Any]:
    """A function of a module of this folder, which is imported when the function is called.

    Triton, which such a module imports, is needed on a GPU alone.
    """

    @cache
    def imported() -> Callable[..., Any]:
        found = importlib.import_module(f"{__package__}.{module}")
        function: Callable[..., Any] = getattr(found, name)
        return function

    return lambda *given: imported()(*given)


def define(
    schema: str,
    *,
    plain: Callable[..., Any],
    kernel: Callable[..., Any],
    empty: Callable[..., Any],
) -> Callable[..., Any]:
    """An operator, without a gradient of its own.

    Args:
        schema: its name, arguments and results, as ``torch.library`` writes them.
        plain: computes it in plain torch, on any device.
        kernel: computes it on a GPU that Triton knows, in fp32; in fp64 ``plain`` does.
        empty: makes its results without computing them, for tensors that have no values.
    """

    def on_a_gpu(first: Tensor, *others: Any) -> Any:
        return (plain if first.dtype == torch.float64 else kernel)(first, *others)

    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, plain, "CPU")
    _LIBRARY.impl(name, on_a_gpu if has_triton() else plain, "CUDA")
    _LIBRARY.impl(name, empty, "Meta")
    operator: Callable[..., Any] = getattr(torch.ops.megatron_mimo, name).default
    if not has_triton():
        return operator

    def call(first: Tensor, *others: Any) -> Any:
        # torch's dispatch costs as much of the host's time as a launch; here nobody looks on.
        if (
            first.is_cuda
            and type(first) is Tensor
            and _get_current_dispatch_mode() is None
            and not torch.compiler.is_compiling()
        ):
            return on_a_gpu(first, *others)
        return operator(first, *others)

    return call
