"""The GPTModel of a language model, from its settings and its Hugging Face configuration."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.language.expert_balance import BalancedPart
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers import LayerTraits, language_layer_spec
from megatron.mimo.layers.balanced_router import balanced_layers
from megatron.mimo.layers.rotary import Frequencies
from megatron.mimo.models.common.language.gpt import LanguageGPT
from megatron.mimo.models.common.language.kinds import expert_layers, has_bias, kind_of
from megatron.mimo.models.common.language.rope import frequencies, rope_by_layer
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.settings import LanguageSettings

__all__ = ["language_spec"]


def language_spec(
    settings: LanguageSettings, place: Place, text: Any, *, sees_spans: bool = False
) -> ModuleSpec:
    """The GPTModel, for ``MimoModelConfig.language_model_spec``.

    Args:
        settings: what it is built of.
        place: of the language model.
        text: its Hugging Face configuration, for what Megatron has no argument for.
        sees_spans: rows of one item see each other, as ``Media.spans`` says.
    """
    kind, config = kind_of(text), _config(settings.transformer, text)
    rotary, kind_of_layer = _rotary(settings, text)
    scaling = settings.rope_scaling_factor
    traits = LayerTraits(
        output_bias=has_bias(text, "attention_bias"),
        sees_spans=sees_spans,
        sandwich_norms=kind.sandwich_norms,
        rotary_kinds=max(len(rotary), 1),
        rotary_kind=kind_of_layer,
        rotary_factors=tuple(one.factor for one in rotary),
    )
    layers = language_layer_spec(config, vp_stage=place.chunk, traits=traits)
    balance = None
    if settings.expert_balance:
        layers = balanced_layers(layers, config)
        balance = BalancedPart(
            weight=settings.expert_balance,
            layers=len(expert_layers(text)) if kind.experts else 0,
            experts=config.num_moe_experts or 0,
            best=config.moe_router_topk,
            is_first=place.is_first_stage,
            is_last=place.is_last_stage,
        )
    return ModuleSpec(
        module=LanguageGPT,
        params={
            "tokens": settings.tokens,
            "whole_logits": settings.whole_logits,
            "config": config,
            "transformer_layer_spec": layers,
            "vocab_size": settings.padded_tokens,
            "max_sequence_length": settings.max_positions,
            "pre_process": place.is_first_stage,
            "post_process": place.is_last_stage,
            "vp_stage": place.chunk,
            "pg_collection": place.groups,
            "position_embedding_type": settings.position_embedding,
            "rotary_percent": settings.rotary_percent,
            "rotary_base": settings.rotary_base,
            "rope_scaling": scaling is not None,
            **({} if scaling is None else {"rope_scaling_factor": scaling}),
            "share_embeddings_and_output_weights": settings.ties_output,
            "scatter_embedding_sequence_parallel": False,
            "rotary": rotary,
            "embedding_scale": text.hidden_size**0.5 if kind.scales_embedding else 1.0,
            "logit_cap": getattr(text, "final_logit_softcapping", None),
            "balance": balance,
        },
    )


def _rotary(
    settings: LanguageSettings, text: Any
) -> tuple[tuple[Frequencies, ...], tuple[int, ...]]:
    """The kinds of frequencies, none where they are Megatron's own, and the kind of every layer.

    Raises:
        ConfigError: --use-rope-scaling with another kind of scaling.
    """
    parameters, kind_of_layer = rope_by_layer(text)
    names = {rope["rope_type"] for rope in parameters}
    if names == {"default"} and not kind_of_layer:
        return (), ()
    if settings.rope_scaling_factor is not None and names != {"llama3"}:
        raise ConfigError(
            f"--use-rope-scaling with rotary embeddings of the kind {', '.join(sorted(names))}; "
            "expected 'default' or 'llama3': leave the flag out"
        )
    told: dict[str, Any] = {} if kind_of_layer else {"rope_theta": settings.rotary_base}
    if settings.rope_scaling_factor is not None:
        told["factor"] = settings.rope_scaling_factor
    return tuple(frequencies(text, {**rope, **told}) for rope in parameters), kind_of_layer


def _config(given: TransformerConfig, text: Any) -> TransformerConfig:
    """Megatron's configuration with what its arguments cannot say."""
    changes: dict[str, Any] = {}
    if kind_of(text).gelu:
        changes["activation_func"] = partial(F.gelu, approximate="tanh")
        changes["bias_activation_fusion"] = False  # Megatron fuses SiLU alone with a gate
    scale = getattr(text, "query_pre_attn_scalar", None)
    if scale is not None:
        changes["softmax_scale"] = scale**-0.5
    config = copy.copy(given)
    vars(config).update(changes)
    return config
