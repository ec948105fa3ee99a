"""A module's optimizer state in sharded checkpoints: what is no tensor becomes sharded objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.optimizer import DistributedOptimizer, FP32Optimizer

_OBJECTS = "_mimo_objects"
_GROUPS, _STEP, _SCALER, _SHARDING = (
    "param_groups",
    "common_step",
    "grad_scaler",
    "param_state_sharding_type",
)


def prime(optimizer: Any) -> None:
    """Give an Adam that has not stepped yet the state of zero steps.

    megatron-core leaves such state out of a checkpoint, or fails to write it, and asks for it
    when loading.

    Args:
        optimizer: one of Megatron's optimizers.

    Raises:
        UnsupportedError: (a ``RuntimeError``) a distributed optimizer over torch's Adam.
    """
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.Adam) and isinstance(optimizer, DistributedOptimizer):
        raise UnsupportedError(
            f"megatron-core's distributed optimizer cannot load the state of "
            f"torch.optim.{type(inner).__name__}; install Transformer Engine or apex, or call "
            "megatron.mimo.layers.install_adam() before the optimizer is built"
        )
    if optimizer.init_state_fn is None or any(inner.state.values()):
        return
    optimizer.init_state_fn(inner, optimizer.config)
    if not isinstance(inner, torch.optim.Adam):
        return
    for group in inner.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            device = parameter.device if on_device else None
            inner.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)


def take_out(module: str, state: Any, parts: Sequence[Any], replica: int) -> None:
    """Turn what is common to the module's ranks into sharded objects, in place.

    Args:
        module: its name, the prefix of all keys.
        state: the module's sharded state; of one part, or numbered by part.
        parts: the module's optimizers.
        replica: 0 on the rank that writes the objects.
    """
    for suffix, part_state, _ in _each(state, parts):
        inner = part_state.get("optimizer", part_state)
        objects: dict[str, Any] = {}
        if not isinstance(inner, ShardedObject) and _GROUPS in inner:
            groups = [{**group, "params": []} for group in inner.pop(_GROUPS)]
            objects[_GROUPS] = deepcopy(groups)
            if "state" in inner:
                objects[_STEP] = inner["state"].pop(_STEP, None)
        for what in (_SCALER, _SHARDING):
            value = part_state.get(what)
            if value is not None and not isinstance(value, ShardedObject):
                objects[what] = part_state.pop(what)
        part_state[_OBJECTS] = {
            what: ShardedObject(
                f"optimizer.mimo.{module}{suffix}.{what}", value, (1,), (0,), replica_id=replica
            )
            for what, value in objects.items()
        }
    add_prefix_for_sharding(state, f"mimo.{module}.")


def give_back(module: str, state: Any, parts: Sequence[Any]) -> None:
    """Undo ``take_out`` on state that was loaded, in place.

    Args:
        module: its name, for errors.
        state: as loaded; state that went through no ``take_out`` stays as it is.
        parts: the module's optimizers, whose parameters the groups get.

    Raises:
        ConfigError: the checkpoint's parameter groups are not the optimizer's.
    """
    for _, part_state, part in _each(state, parts):
        objects: dict[str, Any] = part_state.pop(_OBJECTS, {})
        for what in (_SCALER, _SHARDING):
            if what in objects:
                part_state[what] = objects[what]
        if _GROUPS not in objects:
            continue
        # A dictionary that was left empty does not come back from a checkpoint.
        is_flat = isinstance(part, FP32Optimizer)
        inner = part_state if is_flat else part_state.setdefault("optimizer", {})
        current = part.optimizer.state_dict()[_GROUPS]
        loaded = objects[_GROUPS]
        if len(loaded) != len(current):
            raise ConfigError(
                f"the checkpoint has {len(loaded)} parameter groups of module {module!r} and the "
                f"optimizer {len(current)}; build it with the config_overrides it was saved with"
            )
        for group, own in zip(loaded, current, strict=True):
            group["params"] = own["params"]
        inner[_GROUPS] = loaded
        if _STEP in objects:
            step = objects[_STEP]
            if step is None and isinstance(part.optimizer, torch.optim.Adam):
                step = torch.zeros((), dtype=torch.float32)  # megatron-core leaves a zero out
            inner.setdefault("state", {})
            if step is not None:
                inner["state"][_STEP] = step


def _each(state: Any, parts: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Suffix of the keys, state and optimizer of every part of a module."""
    if len(parts) == 1:
        yield "", state, parts[0]
        return
    for number, part in enumerate(parts):
        yield f".{number}" if number else "", state[number], part
