"""LLaVA: images of one size through CLIP or SigLIP, an MLP, and a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.models.common.config_fields import ModelFields, field_rules, parts_of
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.language import language_spec, text_config
from megatron.mimo.models.common.llava_kind import (
    CLIP_OR_SIGLIP,
    LLAVA_FIELDS,
    image_encoders,
    image_format,
    key_table,
    language,
    projector_spec,
)
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION, random_text_with_images
from megatron.mimo.models.common.vision_tower import image_shape, rows_per_image
from megatron.mimo.models.llava.assembly import ASSEMBLY
from megatron.mimo.models.llava.sample import sample

__all__ = ["FAMILY"]

FIELDS = ModelFields(
    rules=field_rules(LLAVA_FIELDS, aside="image_seq_length"),
    parts={
        "text_config": parts_of("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"),
        "vision_config": CLIP_OR_SIGLIP,
    },
)


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    megatron = config_at(settings.transformer, place)
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": image_encoders(config, megatron, place),
            "input_projections": [projector_spec(config, megatron, place)],
        },
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_index},
    )


def media(config: Any) -> Media:
    """One item is one image."""
    return Media(
        special_token_ids={"images": config.image_token_index},
        formats={"images": image_format(config)},
    )


def tiny() -> Any:
    """CLIP with 3 layers, of which features take 2, and LLaMA with 2."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        text_config=LlamaConfig(**TINY_TEXT),
        image_token_index=4,
        image_seq_length=9,
        architectures=["LlavaForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images with text before, between and behind them."""
    vision = config.vision_config
    count = int(torch.randint(1, 4, (), generator=generator))
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    return {
        "input_ids": random_text_with_images(config, [rows] * count, generator),
        "pixel_values": torch.randn(count, *image_shape(vision), generator=generator),
    }


FAMILY = Family(
    name="llava",
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    assembly=ASSEMBLY,
)
