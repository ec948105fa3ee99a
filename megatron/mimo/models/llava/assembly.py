"""LLaVA put together from a language model and CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.models.common.assembly import IMAGES, LANGUAGE, Assembly, language_part
from megatron.mimo.models.common.published_parts import (
    IMAGES_PART,
    check_images,
    common_settings,
    image_settings,
    select_strategy,
    vision_of,
)
from megatron.mimo.models.common.vision_tower import rows_per_image

__all__ = ["ASSEMBLY"]


def _compose(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    from transformers import LlavaConfig

    vision = vision_of(parts)
    return LlavaConfig(
        image_seq_length=rows_per_image(vision, strategy=select_strategy(vision)),
        architectures=["LlavaForConditionalGeneration"],
        **common_settings(parts, tokens),
    )


def _processor(config: Any, read: Mapping[str, Any], template: str) -> Any:
    from transformers import LlavaProcessor

    check_images(config.vision_config, read[IMAGES])
    return LlavaProcessor(
        image_processor=read[IMAGES], **image_settings(config, read[LANGUAGE], template)
    )


ASSEMBLY = Assembly(
    parts={
        LANGUAGE: language_part("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
        IMAGES: IMAGES_PART,
    },
    compose=_compose,
    processor=_processor,
)
