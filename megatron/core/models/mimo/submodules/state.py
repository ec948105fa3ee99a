"""Sharded state of modules that may or may not know Megatron's tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import unwrap_model

Offsets = tuple[tuple[int, int, int], ...]

# In a checkpoint's content metadata: its weights come from elsewhere, so that layers of Transformer
# Engine (and those that stand in for them) find no state of their own in it.
WITHOUT_EXTRA_STATE = "mimo_without_extra_state"


def sharded_state(
    module: torch.nn.Module,
    prefix: str = "",
    sharded_offsets: Offsets = (),
    metadata: dict[str, Any] | None = None,
    *,
    tp_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """State of ``module`` as sharded tensors, whatever it is made of.

    A module that has ``sharded_state_dict`` is asked. Any other keeps its own parameters and
    buffers as replicas over ``tp_group`` (only its first rank writes them) and is descended
    into, so that a plain container of tensor-parallel layers is sharded too.

    Args:
        module: any module; wrappers of data parallelism and precision leave no name in a key.
        prefix: prefix of every key.
        sharded_offsets: dimensions that an outer module has added.
        metadata: Megatron's; ``dp_cp_group`` is read from it.
        tp_group: tensor-parallel group; None for Megatron's global one.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    module = unwrap_model(module)
    if hasattr(module, "sharded_state_dict"):
        state: dict[str, Any] = sharded_state_dict_default(
            module, prefix, sharded_offsets, metadata
        )
        return state
    return descended_state(module, prefix, sharded_offsets, metadata, tp_group=tp_group)


def descended_state(
    module: torch.nn.Module,
    prefix: str,
    sharded_offsets: Offsets,
    metadata: dict[str, Any],
    *,
    tp_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """State of ``module`` without asking it: its own as replicas, then that of each child.

    What a module's own ``sharded_state_dict`` calls; arguments as for ``sharded_state``.
    """
    state = _own_state(module, prefix, sharded_offsets, metadata, tp_group=tp_group)
    for name, child in module.named_children():
        state.update(
            sharded_state(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
        )
    if metadata.get(WITHOUT_EXTRA_STATE):
        return {name: _kept_out(name, value) for name, value in state.items()}
    return state


def forgive_extra_state(_: torch.nn.Module, incompatible: Any) -> None:
    """Hook of ``load_state_dict``: a layer's extra state may be missing, or there without a layer.

    It is what Transformer Engine's layers keep for FP8. Weights that were trained or converted
    without it have none, and Megatron saves none for attention; Transformer Engine forgives that
    only to attention of one name, which one in a wrapper does not have.
    """
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [key for key in keys if not key.endswith("._extra_state")]


def _kept_out(name: str, value: Any) -> Any:
    """A layer's extra state as one that no checkpoint has and that stays as it is."""
    if name.endswith("._extra_state") and isinstance(value, ShardedObject):
        return LocalNonpersistentObject(value.data)
    return value


def _own_state(
    module: torch.nn.Module,
    prefix: str,
    sharded_offsets: Offsets,
    metadata: dict[str, Any],
    *,
    tp_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """The module's own parameters, buffers and extra state, children left out, as replicas."""
    if tp_group is None:
        tp_group = parallel_state.get_tensor_model_parallel_group()
    plain: dict[str, Any] = {}
    module._save_to_state_dict(plain, "", keep_vars=True)
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        plain,
        prefix,
        {},
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return state
