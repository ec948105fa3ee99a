"""Recipes ``gemma3_4b``, ``gemma3_12b`` and ``gemma3_27b``: images."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of


def gemma3_4b() -> Recipe:
    """Gemma 3 4B."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    }
    return _gemma("gemma3_4b", "Gemma 3 4B, SigLIP with pan-and-scan", text)


def gemma3_12b() -> Recipe:
    """Gemma 3 12B."""
    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    }
    return _gemma("gemma3_12b", "Gemma 3 12B, SigLIP with pan-and-scan", text)


def gemma3_27b() -> Recipe:
    """Gemma 3 27B, whose heads are scaled as if they were larger."""
    text = {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    }
    return _gemma("gemma3_27b", "Gemma 3 27B, SigLIP with pan-and-scan", text)


def _gemma(name: str, summary: str, text: dict[str, Any]) -> Recipe:
    def config() -> Any:
        from transformers import Gemma3Config

        return Gemma3Config(
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
                "vision_use_head": False,
            },
            text_config={
                **text,
                "model_type": "gemma3_text",
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "sliding_window": 1024,
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": 1_000_000.0,
                        "factor": 8.0,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                },
            },
            mm_tokens_per_image=256,
            architectures=["Gemma3ForConditionalGeneration"],
        )

    return pretrained(
        name=name,
        summary=summary,
        family="gemma3",
        config=config,
        arguments=FINETUNING_LONG,
        presets=presets_of("images"),
    )
