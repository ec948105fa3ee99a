"""Functions whose backward pass computes them again, from their inputs: nothing else is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are kept for the backward pass.

    Args:
        function: without random numbers; gives one tensor.
        arguments: tensors, and others, which get no gradient.
    """
    result: Tensor = _Recomputed.apply(function, *arguments)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.function = function
        ctx.others = [None if isinstance(one, Tensor) else one for one in arguments]
        ctx.places = [place for place, one in enumerate(arguments) if isinstance(one, Tensor)]
        ctx.save_for_backward(*(arguments[place] for place in ctx.places))
        return function(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        arguments, leaves = list(ctx.others), {}
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor.detach()
            if ctx.needs_input_grad[place + 1]:
                leaves[place] = arguments[place].requires_grad_()
        with torch.enable_grad():
            output = ctx.function(*arguments)
        found = torch.autograd.grad(output, list(leaves.values()), gradient)
        gradients: list[Tensor | None] = [None] * (len(arguments) + 1)
        for place, one in zip(leaves, found, strict=True):
            gradients[place + 1] = one
        return tuple(gradients)
