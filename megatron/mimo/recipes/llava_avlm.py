"""Recipes ``llava_avlm`` and ``llava_avlm_tiny``: images and audio in one model."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models import load_family
from megatron.mimo.recipes.pretrained import Task, pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING
from megatron.mimo.recipes.tiny.settings import TINY_ARGUMENTS, TINY_STAGES

_ENCODERS = ["images.encoders", "audio.encoders"]
STAGES: dict[str, dict[str, object]] = {
    "projector": {"freeze": [*_ENCODERS, "language"], "lr": 1e-3, "global_batch_size": 256},
    "full": {"freeze": _ENCODERS},
    "lora": {
        "freeze": _ENCODERS,
        "lora": ["language"],
        "lora_rank": 128,
        "lora_alpha": 256.0,
        "lr": 2e-4,
        "module_lr": [("images.projections", 2e-5), ("audio.projections", 2e-5)],
    },
}


def llava_avlm() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels, Whisper large's encoder and Vicuna 7B."""
    return pretrained(
        name="llava_avlm",
        summary="LLaVA with ears, CLIP + Whisper large + Vicuna 7B",
        family="llava_avlm",
        config=_config,
        arguments=FINETUNING | {"seq_length": 4096},
        stages=STAGES,
        default_stage="full",
    )


def llava_avlm_tiny() -> Recipe:
    """The same, small enough to learn digits and tones in seconds."""
    from megatron.mimo.recipes.tiny.processors import llava_avlm_processor
    from megatron.mimo.recipes.tiny.tasks import Made, say_tones_and_digits

    return pretrained(
        name="llava_avlm_tiny",
        summary="LLaVA with ears of 0.3 million parameters: digits and tones",
        family="llava_avlm",
        config=load_family("llava_avlm").tiny,
        arguments=TINY_ARGUMENTS,
        stages=TINY_STAGES,
        default_stage="full",
        processor=llava_avlm_processor,
        task=Task(
            train=lambda: Made(say_tones_and_digits, 4096, held_out=False),
            valid=lambda: Made(say_tones_and_digits, 32, held_out=True),
            answer_tokens=10,
        ),
    )


def _config() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, WhisperConfig

    from megatron.mimo.models.llava_avlm_reference import LlavaAvlmConfig

    return LlavaAvlmConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        audio_config=WhisperConfig(
            num_mel_bins=128,
            encoder_layers=32,
            encoder_attention_heads=20,
            encoder_ffn_dim=5120,
            d_model=1280,
            max_source_positions=1500,
        ),
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            pad_token_id=32002,
        ),
        image_token_index=32000,
        audio_token_index=32001,
        architectures=["LlavaAvlmForConditionalGeneration"],
    )
