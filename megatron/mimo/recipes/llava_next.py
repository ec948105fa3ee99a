"""Recipes ``llava_next`` and ``llava_next_tiny``: images as tiles of any resolution.

``llava_next`` has the sizes of LLaVA 1.6 with Mistral 7B.
"""

from __future__ import annotations

from typing import Any

from megatron.mimo.models import load_family
from megatron.mimo.recipes.pretrained import Task, pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, VISION_STAGES
from megatron.mimo.recipes.tiny.settings import TINY_ARGUMENTS, TINY_STAGES


def llava_next() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels, up to five tiles per image, and Mistral 7B."""
    return pretrained(
        name="llava_next",
        summary="LLaVA 1.6, CLIP on tiles + Mistral 7B",
        family="llava_next",
        config=_config,
        # The encoder is trained as well, slowly, as LLaVA 1.6 does.
        arguments=FINETUNING | {"seq_length": 4096},
        stages=VISION_STAGES | {"full": {"lr": 1e-5, "module_lr": [("images.encoders", 2e-6)]}},
        default_stage="full",
    )


def llava_next_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    from megatron.mimo.recipes.tiny.processors import llava_next_processor
    from megatron.mimo.recipes.tiny.tasks import Made, say_digits

    return pretrained(
        name="llava_next_tiny",
        summary="LLaVA 1.6 of 0.2 million parameters that reads scanned digits",
        family="llava_next",
        config=load_family("llava_next").tiny,
        arguments=TINY_ARGUMENTS | {"seq_length": 160},  # up to two images of five tiles
        stages=TINY_STAGES,
        default_stage="full",
        processor=llava_next_processor,
        task=Task(
            train=lambda: Made(say_digits, 4096, held_out=False),
            valid=lambda: Made(say_digits, 32, held_out=True),
            answer_tokens=6,
        ),
    )


def _config() -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32064,
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            sliding_window=None,
            pad_token_id=32001,
        ),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        architectures=["LlavaNextForConditionalGeneration"],
    )
