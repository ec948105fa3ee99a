"""Makes the optimizer's state complete in every checkpoint, even before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.core.models.mimo.optimizer.common_state import into_links
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.mimo.backend.hooks import EXPERTS_STATE, ZERO_STATE
from megatron.mimo.backend.patching import replace_in

__all__ = ["fill_state", "load_into_any_chain"]


def fill_state(optimizer: Any) -> None:
    """Give every parameter of a new optimizer its state, before the first step.

    Loading expects the state of every parameter in a checkpoint, but an optimizer that has taken no
    step yet has none to write (in fp16 the first steps are skipped until the loss scale fits). SGD,
    for which Megatron has no initial state, gets zeros; the precision-aware Adam makes its own.

    Args:
        optimizer: Megatron's, of the whole model.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is None:
            continue  # nothing is trained here
        if part.init_state_fn is None:
            replace_in(part, ZERO_STATE, lambda _: _zero_momentum)
        elif part.config.use_precision_aware_optimizer:
            replace_in(part, ZERO_STATE, lambda _: _precise_state)
        part.init_state_fn(part.optimizer, part.config)


def _precise_state(optimizer: Any, _config: Any = None) -> None:
    """The state of Transformer Engine's Adam as its first step makes it.

    Megatron leaves out what Transformer Engine decides for each parameter: whether it keeps the
    whole fp32 weight, or only the bits that the bf16 weight lacks.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                remainders = optimizer.store_param_remainders and param.dtype == torch.bfloat16
                optimizer.initialize_state(param, remainders)


def load_into_any_chain(optimizer: Any) -> None:
    """Let a run whose experts are divided over other numbers of ranks go on from a checkpoint.

    Args:
        optimizer: Megatron's, of the whole model.
    """

    def around(load: Callable[[Any], None]) -> Callable[[Any], None]:
        def loaded(state_dict: Any) -> None:
            load(into_links(state_dict, optimizer.chained_optimizers))

        return loaded

    if type(optimizer) is ChainedOptimizer and len(optimizer.chained_optimizers):
        replace_in(optimizer, EXPERTS_STATE, around)


def _zero_momentum(optimizer: torch.optim.Optimizer, _config: Any = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"] if group.get("momentum") else ():
            state = optimizer.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param.data)
