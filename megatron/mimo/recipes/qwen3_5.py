"""Recipes of the dense Qwen3.5: ``qwen3_5_4b``, ``_9b`` and ``_27b``; images and clips."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of

# Layers, hidden size and MLP of the encoder: of the small model, and of all others.
SMALL = (24, 1024, 4096)
LARGE = (27, 1152, 4304)
Vision = tuple[int, int, int]


def qwen3_5_4b() -> Recipe:
    """Qwen3.5 4B, whose output layer is the embedding."""
    return _dense("4b", (32, 2560, 16, 4, 32), 9216, SMALL, tied=True)


def qwen3_5_9b() -> Recipe:
    """Qwen3.5 9B."""
    return _dense("9b", (32, 4096, 16, 4, 32), 12288, LARGE, tied=False)


def qwen3_5_27b() -> Recipe:
    """Qwen3.5 27B; Qwen3.6 27B and Qwen3.8 27B have its sizes."""
    return _dense("27b", (64, 5120, 24, 4, 48), 17408, LARGE, tied=False)


def _dense(
    size: str, text: tuple[int, int, int, int, int], inner: int, vision: Vision, *, tied: bool
) -> Recipe:
    """``text`` as :func:`configuration` takes it; ``inner`` is the width of the MLP."""

    def config() -> Any:
        from transformers import Qwen3_5Config

        return Qwen3_5Config(
            **configuration(text, vision, intermediate_size=inner),
            tie_word_embeddings=tied,
            architectures=["Qwen3_5ForConditionalGeneration"],
        )

    return pretrained(
        name=f"qwen3_5_{size}",
        summary=f"Qwen3.5 {size.upper()}, gated delta net, images and video",
        family="qwen3_5",
        config=config,
        arguments=FINETUNING_LONG,
        presets=presets_of("images"),
    )


def configuration(
    text: tuple[int, int, int, int, int], vision: Vision, **given: Any
) -> dict[str, Any]:
    """What all of them have, around the sizes of one.

    Args:
        text: layers, hidden size, heads of queries, of keys, and of a linear layer's values.
        vision: layers, hidden size and MLP of the encoder.
        given: further fields of the language model.
    """
    layers, hidden, heads, keys, linear_values = text
    depth, width, mlp = vision
    return {
        "vision_config": {
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
        },
        "text_config": {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": linear_values,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "vocab_size": 248320,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
            "eos_token_id": 248044,
            **given,
        },
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "image_token_id": 248056,
        "video_token_id": 248057,
    }
