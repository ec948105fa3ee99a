"""Optimizer state of a model that is not trained as a whole, in checkpoints.

Megatron keeps equal layers of a stack as one tensor with a layer axis, in the optimizer's state as
in the model's, and refuses to write one with gaps. Here the optimizer's state is kept layer by
layer, each under a key with its number, and the model's as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.mimo.backend.hooks import LAYERS_APART
from megatron.mimo.backend.patching import replace_in

__all__ = ["has_gaps", "keep_layers_apart"]

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

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def sharded_state_dict(of_model: Any, *args: Any, **keywords: Any) -> Any:
            return original(dict_list_map_outplace(_apart, of_model), *args, **keywords)

        return sharded_state_dict

    replace_in(optimizer, LAYERS_APART, around)


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
