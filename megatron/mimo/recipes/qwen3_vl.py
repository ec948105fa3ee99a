"""Recipes of the dense Qwen3-VL: ``qwen3_vl_2b``, ``_4b``, ``_8b``, ``_32b``; images and clips."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of

# Layers, hidden size, MLP and layers that give levels: of the two small models, and all others.
SMALL = (24, 1024, 4096, [5, 11, 17])
LARGE = (27, 1152, 4304, [8, 16, 24])
Vision = tuple[int, int, int, list[int]]


def qwen3_vl_2b() -> Recipe:
    """Qwen3-VL 2B, whose output layer is the embedding."""
    return _dense("2b", (28, 2048, 6144, 16), SMALL, tied=True)


def qwen3_vl_4b() -> Recipe:
    """Qwen3-VL 4B, whose output layer is the embedding."""
    return _dense("4b", (36, 2560, 9728, 32), SMALL, tied=True)


def qwen3_vl_8b() -> Recipe:
    """Qwen3-VL 8B."""
    return _dense("8b", (36, 4096, 12288, 32), LARGE, tied=False)


def qwen3_vl_32b() -> Recipe:
    """Qwen3-VL 32B."""
    return _dense("32b", (64, 5120, 25600, 64), LARGE, tied=False)


def _dense(size: str, text: tuple[int, int, int, int], vision: Vision, *, tied: bool) -> Recipe:
    """``text``: layers, hidden size, MLP, heads."""

    def config() -> Any:
        from transformers import Qwen3VLConfig

        return Qwen3VLConfig(
            **configuration(text, vision, num_key_value_heads=8),
            tie_word_embeddings=tied,
            architectures=["Qwen3VLForConditionalGeneration"],
        )

    return pretrained(
        name=f"qwen3_vl_{size}",
        summary=f"Qwen3-VL {size.upper()}, images and video",
        family="qwen3_vl",
        config=config,
        arguments=FINETUNING_LONG,
        presets=presets_of("images"),
    )


def configuration(text: tuple[int, int, int, int], vision: Vision, **given: Any) -> dict[str, Any]:
    """What all of them have, around the sizes of one; ``given`` are of the language model."""
    layers, hidden, inner, heads = text
    depth, width, mlp, levels = vision
    return {
        "vision_config": {
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": levels,
            "out_hidden_size": hidden,
        },
        "text_config": {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "pad_token_id": 151643,
            **given,
        },
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
    }
