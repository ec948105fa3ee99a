"""Layers of a decoder that have a gated delta net in place of attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.mimo.layers.gated_delta_net.spec import gated_delta_net_spec

__all__ = ["first_layer", "is_linear", "with_linear_layers"]


def is_linear(config: TransformerConfig, layer: int) -> bool:
    """Whether a layer, counted from 0 over the whole model, has no attention.

    ``config.linear_attention_freq`` is megatron-core's: a list of 1 and 0, or N for one layer of
    attention behind every N - 1 others.

    Raises:
        ConfigError: a list that has not an entry for each layer.
    """
    given = config.linear_attention_freq
    if given is None:
        return False
    if isinstance(given, int):
        return (layer + 1) % given != 0
    if len(given) != config.num_layers:
        raise ConfigError(
            f"linear_attention_freq has {len(given)} entries; expected {config.num_layers}, one "
            "for each layer (--num-layers)"
        )
    return bool(given[layer])


def first_layer(config: TransformerConfig, *, vp_stage: int | None, pp_rank: int | None) -> int:
    """The number of the first layer of a stage, counted from 0 over the whole model."""
    layout: Any = config.pipeline_model_parallel_layout
    if layout is not None:
        numbers = layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        return int(numbers[0]) if numbers else 0
    return int(get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank))


def with_linear_layers(
    layers: Sequence[ModuleSpec], config: TransformerConfig, first: int, *, with_te: bool
) -> list[ModuleSpec]:
    """The layers of a stage, those that ``is_linear`` names without attention.

    Args:
        layers: of the stage, all with attention.
        config: of the language model.
        first: see :func:`first_layer`.
        with_te: layers are Transformer Engine's, which fuses the norm before attention with the
            projections behind it: here it stands alone.
    """
    return [
        _linear(layer, with_te=with_te) if is_linear(config, first + place) else layer
        for place, layer in enumerate(layers)
    ]


def _linear(layer: ModuleSpec, *, with_te: bool) -> ModuleSpec:
    given: Any = layer.submodules
    changes: dict[str, Any] = {
        "self_attention": gated_delta_net_spec(with_transformer_engine=with_te),
        # In a checkpoint the norm is called what it is called in the layer.
        "sharded_state_dict_keys_map": {
            ours: theirs
            for ours, theirs in given.sharded_state_dict_keys_map.items()
            if ours != "input_layernorm."
        },
    }
    if with_te:
        from megatron.core.extensions.transformer_engine import TENorm

        changes["input_layernorm"] = TENorm
    other = copy.copy(layer)
    other.submodules = replace(given, **changes)
    return other
