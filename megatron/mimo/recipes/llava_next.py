"""Recipes ``llava_next`` and ``llava_next_tiny``: images as tiles of any resolution.

``llava_next`` has the sizes of LLaVA 1.6 with Mistral 7B.
"""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.published import clip_large
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of

# The encoder is trained as well, slowly, as LLaVA 1.6 does.
_FULL: dict[str, object] = {"lr": 1e-5, "module_lr": [("images.encoders", 2e-6)]}


def llava_next() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels, up to five tiles per image, and Mistral 7B."""
    return pretrained(
        name="llava_next",
        summary="LLaVA 1.6, CLIP on tiles + Mistral 7B",
        family="llava_next",
        config=_config,
        arguments=FINETUNING | {"seq_length": 4096},
        presets=presets_of("images")
        | {"full": {"lr": 1e-5, "module_lr": [("images.encoders", 2e-6)]}},
    )


def _config() -> Any:
    from transformers import LlavaNextConfig, MistralConfig

    return LlavaNextConfig(
        vision_config=clip_large(),
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
