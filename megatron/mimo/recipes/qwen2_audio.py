"""Recipes ``qwen2_audio_7b`` and ``qwen2_audio_tiny``."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models import load_family
from megatron.mimo.recipes.pretrained import Task, pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import AUDIO_STAGES, FINETUNING
from megatron.mimo.recipes.tiny.settings import TINY_ARGUMENTS, TINY_STAGES


def qwen2_audio_7b() -> Recipe:
    """Whisper large's encoder and Qwen 7B."""
    return pretrained(
        name="qwen2_audio_7b",
        summary="Qwen2-Audio, Whisper large + Qwen 7B",
        family="qwen2_audio",
        config=_config,
        arguments=FINETUNING | {"lr": 1e-5},
        stages=AUDIO_STAGES,
        default_stage="full",
    )


def qwen2_audio_tiny() -> Recipe:
    """The same, small enough to learn tones in seconds."""
    from megatron.mimo.recipes.tiny.processors import qwen2_audio_processor
    from megatron.mimo.recipes.tiny.tasks import Made, say_tones

    return pretrained(
        name="qwen2_audio_tiny",
        summary="Qwen2-Audio of 0.2 million parameters that names tones",
        family="qwen2_audio",
        config=load_family("qwen2_audio").tiny,
        arguments=TINY_ARGUMENTS,
        stages=TINY_STAGES,
        default_stage="full",
        processor=qwen2_audio_processor,
        task=Task(
            train=lambda: Made(say_tones, 4096, held_out=False),
            valid=lambda: Made(say_tones, 32, held_out=True),
            answer_tokens=12,
        ),
    )


def _config() -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2Config

    return Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=128,
            encoder_layers=32,
            encoder_attention_heads=20,
            encoder_ffn_dim=5120,
            d_model=1280,
            max_source_positions=1500,
        ),
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
