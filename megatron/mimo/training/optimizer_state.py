"""Optimizer state that is whole in every checkpoint, whatever the optimizer has done so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["keep_state_whole"]


def keep_state_whole(optimizer: Any) -> None:
    """Let an optimizer save its state as a load asks for it, before its first step too.

    A load makes room for the state of every parameter. What has no state yet (fp16, whose first
    steps are skipped until the loss scale fits) would not be saved, and not be found: it is saved
    as the zeros that it stands for. SGD, for which Megatron knows no such zeros, gets them.

    Args:
        optimizer: Megatron's, of the whole model.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is None:
            continue  # nothing is trained here
        if part.init_state_fn is None:
            part.init_state_fn = _zero_momentum
        for name in ("sharded_state_dict", "save_parameter_state"):
            if hasattr(part, name):
                setattr(part, name, partial(_with_state, part, getattr(part, name)))


def _with_state(part: Any, describe: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    part.init_state_fn(part.optimizer, part.config)
    return describe(*args, **keywords)


def _zero_momentum(optimizer: torch.optim.Optimizer, _config: Any = None) -> None:
    for group in optimizer.param_groups:
        for param in group["params"] if group.get("momentum") else ():
            state = optimizer.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param.data)
