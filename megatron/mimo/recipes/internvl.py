"""Recipes of InternVL 3 and 3.5: images and clips."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of

_SMALL: dict[str, Any] = {"attention_bias": True}  # sizes are the defaults of transformers
_LARGE: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def internvl3_5_1b() -> Recipe:
    """InternViT 300M and Qwen3 0.6B, whose output layer is its own."""
    return _internvl("internvl3_5_1b", "300M + Qwen3 0.6B", _SMALL, _qwen3(1024, 3072, 28, 16))


def internvl3_5_8b() -> Recipe:
    """InternViT 300M and Qwen3 8B."""
    return _internvl("internvl3_5_8b", "300M + Qwen3 8B", _SMALL, _qwen3(4096, 12288, 36, 32))


def internvl3_5_14b() -> Recipe:
    """InternViT 300M and Qwen3 14B."""
    return _internvl("internvl3_5_14b", "300M + Qwen3 14B", _SMALL, _qwen3(5120, 17408, 40, 40))


def internvl3_5_38b() -> Recipe:
    """InternViT 6B, whose 25 heads no even tensor-parallel size divides, and Qwen3 32B."""
    return _internvl("internvl3_5_38b", "6B + Qwen3 32B", _LARGE, _qwen3(5120, 25600, 64, 64))


def internvl3_5_30b_a3b() -> Recipe:
    """InternViT 300M and Qwen3 30B-A3B: 128 experts in every layer, 8 for each token."""
    text = _qwen3(2048, 6144, 48, 32) | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    }
    return _internvl("internvl3_5_30b_a3b", "300M + Qwen3 30B-A3B", _SMALL, text)


def internvl3_8b() -> Recipe:
    """InternViT 300M and Qwen2.5 7B."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
    }
    return _internvl("internvl3_8b", "300M + Qwen2.5 7B", _SMALL, text, image_token=151667)


def _qwen3(hidden: int, inside: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inside,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    }


def _internvl(
    name: str,
    parts: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    *,
    image_token: int = 151671,
) -> Recipe:
    def config() -> Any:
        from transformers import InternVLConfig

        return InternVLConfig(
            vision_config={**vision, "model_type": "internvl_vision"},
            text_config={
                **text,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "tie_word_embeddings": False,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "pad_token_id": 151643,
            },
            image_token_id=image_token,
            tie_word_embeddings=False,
            architectures=["InternVLForConditionalGeneration"],
        )

    return pretrained(
        name=name,
        summary=f"InternVL {'3.5' if '3_5' in name else '3'}, InternViT {parts}",
        family="internvl",
        config=config,
        arguments=FINETUNING | {"lr": 1e-5, "seq_length": 8192},
        presets=presets_of("images"),
    )
