"""LLaVA-NeXT put together from a language model and CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.models.common.assembly import IMAGES, LANGUAGE, Assembly, language_part
from megatron.mimo.models.common.published_parts import (
    IMAGES_PART,
    common_settings,
    image_settings,
    select_strategy,
    vision_of,
)
from megatron.mimo.models.common.vision_tower import rows_per_image

__all__ = ["ASSEMBLY"]


# Tiles of a LLaVA-NeXT image, rows and columns, as it was published.
_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def _compose(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    from transformers import LlavaNextConfig

    vision = vision_of(parts)
    side = vision.image_size
    return LlavaNextConfig(
        image_seq_length=rows_per_image(vision, strategy=select_strategy(vision)),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in _TILES],
        architectures=["LlavaNextForConditionalGeneration"],
        **common_settings(parts, tokens),
    )


def _processor(config: Any, read: Mapping[str, Any], template: str) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side, given = config.vision_config.image_size, read[IMAGES]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=given.image_mean,
        image_std=given.image_std,
        resample=given.resample,
    )
    return LlavaNextProcessor(
        image_processor=images, **image_settings(config, read[LANGUAGE], template)
    )


ASSEMBLY = Assembly(
    parts={
        LANGUAGE: language_part("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
        IMAGES: IMAGES_PART,
    },
    compose=_compose,
    processor=_processor,
)
