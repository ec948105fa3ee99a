"""Where each parameter of a built model lies in a checkpoint.

Megatron answers this with the model's sharded state: for every parameter of this rank, the key of
a global tensor, its shape, and the part that this rank holds. Layers of one block share a key and
an added first axis. Here the answer is put in order by the names that a ``KeyTable`` uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.models.common.keys import KeyEntry, KeyTable

__all__ = ["STATE_METADATA", "Slot", "match_slots", "model_objects", "model_slots"]

# What Megatron's training layer asks of a model's sharded state; the names and shapes depend on it.
STATE_METADATA: dict[str, object] = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

# Fused layers of Transformer Engine hold the norm before them; rows have the names without.
_FUSED_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
)

# In the keys of the weights of all experts of a layer; their number is the last axis added.
_EXPERTS = ".experts.experts."


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter of this rank.

    Attributes:
        name: of the parameter in the whole model, as ``KeyEntry.mimo`` has it.
        key: of the global tensor in a checkpoint.
        sharded: Megatron's description, with this rank's parameter in it.
    """

    name: str
    key: str
    sharded: ShardedTensor | ShardedTensorFactory

    def pieces(self) -> list[ShardedTensor]:
        """Parts of the global tensor that the parameter holds, as views of it."""
        if isinstance(self.sharded, ShardedTensorFactory):
            return list(self.sharded.build())
        return [self.sharded]

    def pieces_of(self, tensor: Tensor) -> list[ShardedTensor]:
        """The same for another tensor in the parameter's place, on one tensor-parallel rank."""
        sharded = self.sharded
        if isinstance(sharded, ShardedTensorFactory):
            built = sharded.build_fn(self.key, tensor, sharded.replica_id, sharded.flattened_range)
            return list(built)
        whole = (*sharded.global_shape[: sharded.prepend_axis_num], *tensor.shape)
        placed = ShardedTensor(
            self.key,
            tensor,
            tensor.dtype,
            tuple(tensor.shape),
            whole,
            tuple(sharded.global_offset),
            None,
            prepend_axis_num=sharded.prepend_axis_num,
        )
        return [placed]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter, over all tensor-parallel ranks."""
        piece = self.pieces()[0]
        return tuple(piece.global_shape[piece.prepend_axis_num :])

    @property
    def may_be_padded(self) -> bool:
        """Whether the first axis may be longer here than in a checkpoint (vocabulary)."""
        return isinstance(self.sharded, ShardedTensor) and self.sharded.allow_shape_mismatch


def model_slots(model: Any) -> list[Slot]:
    """Every parameter and persistent buffer that this rank holds of a ``MimoModel``.

    Args:
        model: without wrappers; its process groups exist.
    """
    return [
        Slot(name=_row_name(name, sharded), key=sharded.key, sharded=sharded)
        for name, sharded in _state(model).items()
        if isinstance(sharded, (ShardedTensor, ShardedTensorFactory))
    ]


def model_objects(model: Any) -> list[ShardedObject]:
    """What this rank's layers of a ``MimoModel`` save that is not a tensor; arguments as above."""
    return [value for value in _state(model).values() if isinstance(value, ShardedObject)]


def _state(model: Any) -> dict[str, Any]:
    metadata = {
        **STATE_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = model.sharded_state_dict(metadata=metadata)
    return state


def match_slots(slots: list[Slot], table: KeyTable) -> Iterator[tuple[Slot, KeyEntry]]:
    """Each slot with its row.

    Raises:
        ConfigError: the table has no row for a parameter of the model.
    """
    rows = {row.mimo: row for row in table.each()}
    for slot in slots:
        # An output layer that is the embedding has only the key in common with it.
        row = rows.get(slot.name) or rows.get(slot.key)
        if row is None:
            raise ConfigError(
                f"the model's parameter {slot.name} has no entry in its family's key table; "
                "Family.keys has to name every parameter"
            )
        yield slot, row


def _row_name(name: str, sharded: ShardedTensor | ShardedTensorFactory) -> str:
    """A parameter's name in the whole model: pipeline stages count their layers from 0."""
    piece = sharded.build()[0] if isinstance(sharded, ShardedTensorFactory) else sharded
    if _EXPERTS in sharded.key:
        return _expert_name(sharded.key, piece)
    if piece.prepend_axis_num:
        name = _with_layer(name, sharded.key, piece.global_offset[0])
    else:
        name = _with_own_layer(name, sharded.key)
    for fused, plain in _FUSED_NORMS:
        name = name.replace(fused, plain)
    return name


def _expert_name(key: str, piece: ShardedTensor) -> str:
    """Of an expert's parameter, whatever module holds it: ranks count their experts from 0."""
    *layer, expert = piece.global_offset[: piece.prepend_axis_num]
    if layer:
        key = key.replace(".layers.", f".layers.{layer[0]}.", 1)
    return key.replace(_EXPERTS, f".experts.local_experts.{expert}.")


def _with_layer(name: str, key: str, layer: int) -> str:
    """``name`` with the number that the key does not have (but an added axis) set to ``layer``."""
    for match in re.finditer(r"\.layers\.(\d+)\.", name):
        without = f"{name[: match.start()]}.layers.{name[match.end() :]}"
        if _same_module(without, key):
            return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"
    raise AssertionError(f"{name} has the checkpoint key {key}, which has an axis of layers")


def _with_own_layer(name: str, key: str) -> str:
    """``name`` with its layer's number as the key has it (layers that differ keep theirs)."""
    ours, theirs = (re.search(r"\.layers\.(\d+)\.", text) for text in (name, key))
    if ours and theirs and name[: ours.start()] == key[: theirs.start()]:
        return f"{name[: ours.start(1)]}{theirs[1]}{name[ours.end(1) :]}"
    return name


def _same_module(name: str, key: str) -> bool:
    """Whether a name is a key, up to what the key calls a fused norm."""
    for fused, plain in _FUSED_NORMS:
        key = key.replace(fused, plain)
        name = name.replace(fused, plain)
    return name == key
