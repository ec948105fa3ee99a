"""Recipes ``qwen2_audio_7b`` and ``qwen2_audio_tiny``."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.published import WHISPER_LARGE
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of


def qwen2_audio_7b() -> Recipe:
    """Whisper large's encoder and Qwen 7B."""
    return pretrained(
        name="qwen2_audio_7b",
        summary="Qwen2-Audio, Whisper large + Qwen 7B",
        family="qwen2_audio",
        config=_config,
        arguments=FINETUNING | {"lr": 1e-5},
        presets=presets_of("audio"),
    )


def _config() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2Config

    return Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**WHISPER_LARGE),
        text_config=Qwen2Config(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=156032,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=False,
            bos_token_id=151643,
            eos_token_id=151645,
            pad_token_id=151643,
        ),
        audio_token_index=151646,
        architectures=["Qwen2AudioForConditionalGeneration"],
    )
