"""Qwen3-VL: images and clips of any size through a vision transformer with deepstack, and a Qwen3.

What the dense models and those with experts have in common; ``moe`` is the family of the latter.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.frame_sample import TINY_TOKENS, example, sample
from megatron.mimo.models.common.frame_tower import (
    ENCODER,
    frame_rules,
    level_layers,
    vision_specs,
)
from megatron.mimo.models.common.language import text_config
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT
from megatron.mimo.models.common.visuals import (
    visual_fields,
    visual_language,
    visual_media,
    visual_placeholders,
)
from megatron.mimo.models.qwen3_vl.keys import key_table
from megatron.mimo.models.qwen3_vl.language import deepstack_spec

__all__ = ["FAMILY", "TINY_PARTS", "qwen3_vl_family"]

# Two levels, one on each of two pipeline stages; heads of another size than derived.
TINY_PARTS: dict[str, Any] = {
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
        "out_hidden_size": 64,
        "initializer_range": 0.2,
    },
    "text_config": {
        **TINY_TEXT,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [4, 4, 4],
            "mrope_interleaved": True,
        },
    },
}


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    vision = config.vision_config
    given = visual_language(config)
    _check_levels(level_layers(vision), vision.depth, config.text_config.num_hidden_layers)
    return given


def _check_levels(given: list[int], depth: int, layers: int) -> None:
    """Refuse levels that no layer of the encoder gives, or no layer of the decoder takes."""
    if given != sorted(set(given)) or not set(given) <= set(range(depth)):
        raise ConfigError(
            f"vision_config.deepstack_visual_indexes is {given}; expected ascending numbers of the "
            f"encoder's layers, 0 to {depth - 1}"
        )
    if len(given) > layers:
        raise ConfigError(
            f"text_config.num_hidden_layers is {layers}; expected at least {len(given)}: "
            "vision_config.deepstack_visual_indexes gives each of so many layers rows to add"
        )


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
        language_model_spec=deepstack_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_id},
    )


def media(config: Any) -> Media:
    """One item is one image or clip; later stages add levels of its rows."""
    return visual_media(config, ENCODER, plan_on_every_stage=True)


def tiny() -> Any:
    """A Qwen3-VL of about 0.2 million parameters."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        **TINY_PARTS, **TINY_TOKENS, architectures=["Qwen3VLForConditionalGeneration"]
    )


def qwen3_vl_family(name: str, tiny: Any) -> Family:
    """The family of this name; it has the tiny configuration of its own."""
    return Family(
        name=name,
        fields=visual_fields(name, frame_rules("deepstack_visual_indexes")),
        language=language,
        build=build,
        keys=key_table,
        media=media,
        sample=sample,
        tiny=tiny,
        example=example,
        placeholders=visual_placeholders,
        box_units=lambda *_: (1000, 1000),
    )


FAMILY = qwen3_vl_family("qwen3_vl", tiny)
