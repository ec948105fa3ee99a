"""Qwen3.5: images and clips of any size through a vision transformer, and a hybrid language model.

Three layers in four have a gated delta net, the others attention whose output is gated. What the
dense models and those with experts have in common; ``moe`` is the family of the latter. Models of
later versions that call themselves by the same architectures are the same with other sizes.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.frame_sample import TINY_TOKENS, example, sample
from megatron.mimo.models.common.frame_tower import ENCODER, frame_rules, vision_specs
from megatron.mimo.models.common.language import text_config
from megatron.mimo.models.common.language.interleaved import interleaved_spec
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT
from megatron.mimo.models.common.visuals import (
    visual_fields,
    visual_language,
    visual_media,
    visual_placeholders,
)
from megatron.mimo.models.qwen3_5.keys import key_table

__all__ = ["FAMILY", "TINY_PARTS", "qwen3_5_family"]

# Both kinds of layers on each of two pipeline stages; two value heads to a key head; of a head of
# 24 features 12 turn. What a delta net gives is small here, and its norm with the published epsilon
# of 1e-6 would make of rounding what no comparison could pass.
TINY_PARTS: dict[str, Any] = {
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "num_position_embeddings": 25,
        "out_hidden_size": 64,
        "initializer_range": 0.2,
    },
    "text_config": {
        **TINY_TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 24,
        "rms_norm_eps": 1e-3,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 2, 2],
            "mrope_interleaved": True,
        },
    },
}


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    levels = getattr(config.vision_config, "deepstack_visual_indexes", [])
    if levels:
        raise UnsupportedError(
            f"vision_config.deepstack_visual_indexes is {levels}; expected []: the language model "
            "of Qwen3.5 takes no levels of rows"
        )
    return visual_language(config)


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules=vision_specs(
            config.vision_config, config_at(settings.transformer, place), place
        ),
    )
    return MimoModelConfig(
        language_model_spec=interleaved_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_id},
    )


def tiny() -> Any:
    """A Qwen3.5 of about 0.2 million parameters."""
    from transformers import Qwen3_5Config

    return Qwen3_5Config(
        **TINY_PARTS, **TINY_TOKENS, architectures=["Qwen3_5ForConditionalGeneration"]
    )


def qwen3_5_family(name: str, tiny: Any) -> Family:
    """The family of this name; it has the tiny configuration of its own."""
    return Family(
        name=name,
        fields=visual_fields(name, frame_rules()),
        language=language,
        build=build,
        keys=key_table,
        media=lambda config: visual_media(config, ENCODER),
        sample=sample,
        tiny=tiny,
        example=example,
        placeholders=visual_placeholders,
    )


FAMILY = qwen3_5_family("qwen3_5", tiny)
