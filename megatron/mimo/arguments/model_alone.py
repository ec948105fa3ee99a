"""From Megatron's arguments of a model, as values, to its settings: no parser, no run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.models.common.settings import LanguageSettings

__all__ = ["settings_of"]

_FIELDS = frozenset(field.name for field in fields(TransformerConfig))
# Of a language model, but not of its layers.
_AROUND_LAYERS = frozenset(
    {
        *("vocab_size", "make_vocab_size_divisible_by", "max_position_embeddings"),
        *("position_embedding_type", "rotary_base", "rotary_percent"),
        *("use_rope_scaling", "rope_scaling_factor", "untie_embeddings_and_output_weights"),
        "router_aux_loss_coef",
    }
)
# What TransformerConfig has under other names.
_RENAMED = frozenset({"swiglu", "group_query_attention", "no_persist_layer_norm", "num_experts"})
# Of a run, on every machine that has them; a model alone does without.
_OF_A_RUN = frozenset({"distributed_backend", "disable_jit_fuser", "num_workers"})


def settings_of(values: Mapping[str, Any], *, dtype: torch.dtype) -> LanguageSettings:
    """Settings of a language model.

    Args:
        values: Megatron's arguments by destination, as ``Family.arguments`` and
            ``argument_defaults`` name them.
        dtype: of parameters and computation.

    Raises:
        ConfigError: an argument that is none of a model.
    """
    known = _FIELDS | _AROUND_LAYERS | _RENAMED | _OF_A_RUN
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: not an argument of a model alone; it takes those of Megatron's "
            "TransformerConfig, of the vocabulary and of rotary embeddings"
        )
    transformer = _transformer(values, dtype)
    tp_size = transformer.tensor_model_parallel_size
    tokens, multiple = values["vocab_size"], values["make_vocab_size_divisible_by"] * tp_size
    return LanguageSettings(
        transformer=transformer,
        tokens=tokens,
        padded_tokens=-(-tokens // multiple) * multiple,
        max_positions=values["max_position_embeddings"],
        position_embedding=values["position_embedding_type"],
        rotary_base=values["rotary_base"],
        rotary_percent=values["rotary_percent"],
        rope_scaling_factor=(
            values.get("rope_scaling_factor", 8.0) if values.get("use_rope_scaling") else None
        ),
        ties_output=not values["untie_embeddings_and_output_weights"],
        expert_balance=values.get("router_aux_loss_coef", 0.0),
    )


def _transformer(values: Mapping[str, Any], dtype: torch.dtype) -> TransformerConfig:
    given = {name: value for name, value in values.items() if name in _FIELDS}
    if values.get("swiglu"):
        given |= {"activation_func": F.silu, "gated_linear_unit": True}
    if values.get("num_experts"):
        given["num_moe_experts"] = values["num_experts"]
    if not values.get("group_query_attention"):
        given["num_query_groups"] = None
    tp_size = values["tensor_model_parallel_size"]
    as_in_a_run: dict[str, Any] = {
        "attention_softmax_in_fp32": False,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "calculate_per_token_loss": True,
        "cp_comm_type": "p2p",
        "deallocate_pipeline_outputs": True,
        "tensor_parallel_num_weight_shards": tp_size,
        "expert_tensor_parallel_num_weight_shards": (
            values.get("expert_tensor_parallel_size") or tp_size
        ),
    }
    return TransformerConfig(
        **{**as_in_a_run, **given},
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        persist_layer_norm=not values.get("no_persist_layer_norm"),
    )
