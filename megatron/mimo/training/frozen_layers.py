"""Optimizer state of a model that is not trained as a whole, in checkpoints.

Megatron keeps equal layers of a stack as one tensor with a layer axis, in the optimizer's state as
in the model's, and refuses to write one with gaps. Here the optimizer's state is kept layer by
layer, each under a key with its number, and the model's as ever. And a pipeline stage that trains
nothing loads a checkpoint as others do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

__all__ = ["has_gaps", "keep_layers_apart", "load_nothing"]

_STACKED = re.compile(r"\.layers\.(?!\d)")  # one key for all layers; experts may add a second axis
_LAYER = re.compile(r"(\.layers)\.\d+\.")


def has_gaps(trained: Iterable[str], frozen: Iterable[str]) -> bool:
    """Whether a parameter is trained in some layers of a stack only, given all ranks' paths."""
    both = [
        {_LAYER.sub(r"\1.", path, count=1) for path in paths if _LAYER.search(path)}
        for paths in (trained, frozen)
    ]
    return bool(both[0] & both[1])


def keep_layers_apart(optimizer: Any) -> None:
    """Let the optimizer describe its sharded state layer by layer."""
    original: Callable[..., Any] = optimizer.sharded_state_dict

    def sharded_state_dict(model_sharded_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return original(dict_list_map_outplace(_apart, model_sharded_state_dict), *args, **kwargs)

    optimizer.sharded_state_dict = sharded_state_dict


def load_nothing(optimizer: Any) -> None:
    """Let an optimizer without parameters load its state, which a checkpoint leaves out as empty.

    Args:
        optimizer: Megatron's, of the whole model.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.load_state_dict = partial(_load, part.load_state_dict)


def _load(original: Callable[[Any], None], state_dict: Any) -> None:
    for level in (state_dict, state_dict.get("optimizer")):
        if isinstance(level, dict) and "param_groups" in level:
            level.setdefault("state", {})
    original(state_dict)


def _apart(leaf: Any) -> Any:
    if isinstance(leaf, ShardedTensor) and leaf.prepend_axis_num and _STACKED.search(leaf.key):
        return _without_layer_axis(leaf)
    if isinstance(leaf, ShardedTensorFactory):
        build = leaf.build_fn
        return replace(leaf, build_fn=lambda *args: dict_list_map_outplace(_apart, build(*args)))
    return leaf


def _without_layer_axis(tensor: ShardedTensor) -> ShardedTensor:
    layer = tensor.global_offset[0]
    return replace(
        tensor,
        key=tensor.key.replace(".layers.", f".layers.{layer}.", 1),
        global_shape=tensor.global_shape[1:],
        global_offset=tensor.global_offset[1:],
        axis_fragmentations=tensor.axis_fragmentations[1:] if tensor.axis_fragmentations else None,
        prepend_axis_num=tensor.prepend_axis_num - 1,
    )
