"""LLaVA with ears put together from a LLaMA, CLIP or SigLIP, and Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.models.common.assembly import AUDIO, IMAGES, LANGUAGE, Assembly, language_part
from megatron.mimo.models.common.published_parts import (
    AUDIO_PART,
    IMAGES_PART,
    check_audio,
    check_images,
    common_settings,
)
from megatron.mimo.models.llava_avlm.processor import LlavaAvlmProcessor
from megatron.mimo.models.llava_avlm.reference import LlavaAvlmConfig

__all__ = ["ASSEMBLY"]


def _compose(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:

    return LlavaAvlmConfig(
        audio_config=parts[AUDIO],
        audio_token_index=tokens[AUDIO],
        architectures=["LlavaAvlmForConditionalGeneration"],
        **common_settings(parts, tokens),
    )


def _processor(config: Any, read: Mapping[str, Any], template: str) -> Any:

    check_images(config.vision_config, read[IMAGES])
    check_audio(config.audio_config, read[AUDIO])
    return LlavaAvlmProcessor(
        image_processor=read[IMAGES],
        feature_extractor=read[AUDIO],
        tokenizer=read[LANGUAGE],
        patch_size=config.vision_config.patch_size,
        chat_template=template,
    )


ASSEMBLY = Assembly(
    parts={LANGUAGE: language_part("llama"), IMAGES: IMAGES_PART, AUDIO: AUDIO_PART},
    compose=_compose,
    processor=_processor,
)
