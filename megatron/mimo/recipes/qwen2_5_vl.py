"""Recipes ``qwen2_5_vl_3b``, ``qwen2_5_vl_7b`` and ``qwen2_5_vl_tiny``: images and clips."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of


def qwen2_5_vl_3b() -> Recipe:
    """Qwen2.5-VL 3B, whose output layer is the embedding."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    }
    return _qwen("qwen2_5_vl_3b", "Qwen2.5-VL 3B, images and video", text, tied=True)


def qwen2_5_vl_7b() -> Recipe:
    """Qwen2.5-VL 7B."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    return _qwen("qwen2_5_vl_7b", "Qwen2.5-VL 7B, images and video", text, tied=False)


def _qwen(name: str, summary: str, text: dict[str, int], *, tied: bool) -> Recipe:
    def config() -> Any:
        from transformers import Qwen2_5_VLConfig

        return Qwen2_5_VLConfig(
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
                "out_hidden_size": text["hidden_size"],
            },
            text_config={
                **text,
                "max_position_embeddings": 128000,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": tied,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [16, 24, 24],
                },
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "pad_token_id": 151643,
            },
            tie_word_embeddings=tied,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
            image_token_id=151655,
            video_token_id=151656,
            architectures=["Qwen2_5_VLForConditionalGeneration"],
        )

    return pretrained(
        name=name,
        summary=summary,
        family="qwen2_5_vl",
        config=config,
        arguments=FINETUNING_LONG,
        presets=presets_of("images"),
    )
