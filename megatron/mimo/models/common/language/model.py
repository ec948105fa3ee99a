"""The GPTModel of a language model, from its settings and its Hugging Face configuration."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.layers import language_layer_spec
from megatron.mimo.models.common.language.kinds import kind_of
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.vocabulary import UnpaddedGPT

__all__ = ["language_spec"]


def language_spec(settings: LanguageSettings, place: Place, text: Any) -> ModuleSpec:
    """The GPTModel, for ``MimoModelConfig.language_model_spec``.

    Args:
        settings: what it is built of.
        place: of the language model.
        text: its Hugging Face configuration, for what Megatron has no argument for.
    """
    kind_of(text)
    config = settings.transformer
    scaling = settings.rope_scaling_factor
    return ModuleSpec(
        module=UnpaddedGPT,
        params={
            "tokens": settings.tokens,
            "config": config,
            "transformer_layer_spec": language_layer_spec(config, vp_stage=place.chunk),
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
        },
    )
