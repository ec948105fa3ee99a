"""Recipes ``llava_avlm`` and ``llava_avlm_tiny``: images and audio in one model."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.published import WHISPER_LARGE, clip_large, vicuna
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of


def llava_avlm() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels, Whisper large's encoder and Vicuna 7B."""
    return pretrained(
        name="llava_avlm",
        summary="LLaVA with ears, CLIP + Whisper large + Vicuna 7B",
        family="llava_avlm",
        config=_config,
        arguments=FINETUNING | {"seq_length": 4096},
        presets=presets_of("images", "audio"),
    )


def _config() -> Any:
    from transformers import WhisperConfig

    # It registers a model with transformers, which other recipes do without.
    from megatron.mimo.models.llava_avlm.reference import LlavaAvlmConfig

    return LlavaAvlmConfig(
        vision_config=clip_large(),
        audio_config=WhisperConfig(**WHISPER_LARGE),
        text_config=vicuna(pad_token_id=32002),
        image_token_index=32000,
        audio_token_index=32001,
        architectures=["LlavaAvlmForConditionalGeneration"],
    )
