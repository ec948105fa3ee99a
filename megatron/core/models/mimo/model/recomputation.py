"""Recomputation in backward: what Megatron's needs, so that every gradient is there and right."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer


def prepare_recomputation(model: nn.Module) -> None:
    """Make Megatron's recomputation right in all layers of ``model``, which has just been built.

    An MLP returns its last bias beside its output. As an output of Megatron's checkpointed
    function the bias itself would become a result of that function, and its backward pass would
    call itself without end: recomputed MLPs return a copy.

    Recomputation records nothing for a layer whose input needs no gradient, and what is trained
    inside the layer would be left out without a word: blocks ask for a gradient of their input.
    """
    for module in model.modules():
        if isinstance(module, TransformerLayer) and module.recompute_mlp:
            module.mlp.register_forward_hook(_copy_parameters)
        elif isinstance(module, TransformerBlock) and module.config.recompute_granularity:
            module.register_forward_pre_hook(_ask_for_gradient, with_kwargs=True)


def _copy_parameters(_: nn.Module, __: Any, output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    return tuple(part.clone() if isinstance(part, nn.Parameter) else part for part in output)


def _ask_for_gradient(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not torch.is_tensor(hidden) or hidden.requires_grad or not torch.is_grad_enabled():
        return None
    if not any(parameter.requires_grad for parameter in block.parameters()):
        return None
    asked = hidden.detach().requires_grad_()
    return ((asked, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": asked})
