"""Modalities that a micro-batch does not use, kept in step with ranks whose micro-batch does.

Data-parallel ranks start their collectives as modules are called (parameters are gathered) and as
gradients arrive (gradients are reduced), so ranks have to agree on the order of both, or they add
up different buckets. A modality without rows is therefore run on blank inputs where its encoders
say what these are (``blank_inputs``), and its rows are dropped: the order is the same by
construction. Otherwise its parameters are gathered without a forward, and get a zero gradient one
by one, the last registered first: the order of an encoder that registers
modules as it calls them, which is what Megatron lays its buckets out for.

Legend: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.utils import unwrap_model


def idle_rows(submodule: torch.nn.Module, hidden_size: int) -> Encoded | None:
    """Empty rows [0, H]; their backward gives every trainable parameter of ``submodule`` zeros.

    None where there is nothing to give a gradient to. Call it in the place of ``submodule``.
    """
    parameters = [p for p in submodule.parameters() if p.requires_grad]
    if not parameters:
        return None
    if not torch.is_grad_enabled():
        gather_parameters_of(submodule)
        return None
    blanks = _blank_inputs(submodule)
    if blanks is not None:
        encoded = EncodedRows.of(submodule(encoder_inputs=blanks))
        return encoded.map(lambda tensor: tensor[:0]).simplest()
    gather_parameters_of(submodule)
    # One node per parameter: autograd runs the nodes that were made last first.
    return torch.cat([_ZeroGradient.apply(parameter, hidden_size) for parameter in parameters])


def take_part(merged_SBH: torch.Tensor, idle: Iterable[torch.Tensor]) -> torch.Tensor:
    """Pass ``merged_SBH`` through; in backward, rows [0, H] in ``idle`` get their gradient."""
    idle = list(idle)
    if not idle:
        return merged_SBH
    passed_SBH: torch.Tensor = _TakePart.apply(merged_SBH, *idle)
    return passed_SBH


def _blank_inputs(submodule: torch.nn.Module) -> dict[str, dict[str, Any]] | None:
    bare: Any = unwrap_model(submodule)
    if not (getattr(bare, "is_first_stage", True) and getattr(bare, "is_last_stage", True)):
        return None  # a stage's inputs are another's output
    encoders = getattr(bare, "encoders", None)
    blanks = {}
    for name, encoder in (encoders or {}).items():
        method = getattr(unwrap_model(encoder), "blank_inputs", None)
        if method is None:
            return None
        blanks[name] = method()
    return blanks or None


def gather_parameters_of(submodule: torch.nn.Module) -> None:
    """Gather the parameters of a module that does not run now, as its forward would have begun.

    The pre-forward hooks of Megatron's data-parallel wrapper are called, and no forward.
    """
    for module in submodule.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", None) == DistributedDataParallel.__module__:
                hook(module, ())


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.nn.Parameter, hidden_size: int) -> torch.Tensor:
        ctx.like = parameter.shape, parameter.dtype, parameter.device
        return parameter.new_empty(0, hidden_size)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.zeros((), dtype=dtype, device=device).expand(shape), None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged_SBH: torch.Tensor, *idle: torch.Tensor) -> torch.Tensor:
        ctx.idle = [(rows_NH.shape, rows_NH.dtype, rows_NH.device) for rows_NH in idle]
        return merged_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        empty = [
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle
        ]
        return grad_outputs[0] if ctx.needs_input_grad[0] else None, *empty
