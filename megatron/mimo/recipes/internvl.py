"""Recipes of InternVL 3 and 3.5: images and clips."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of

_SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
}
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
    text = _qwen3(hidden=1024, inside=3072, layers=28, heads=16)
    return _internvl("internvl3_5_1b", "InternVL 3.5, InternViT 300M + Qwen3 0.6B", _SMALL, text)


def internvl3_5_8b() -> Recipe:
    """InternViT 300M and Qwen3 8B."""
    text = _qwen3(hidden=4096, inside=12288, layers=36, heads=32)
    return _internvl("internvl3_5_8b", "InternVL 3.5, InternViT 300M + Qwen3 8B", _SMALL, text)


def internvl3_5_14b() -> Recipe:
    """InternViT 300M and Qwen3 14B."""
    text = _qwen3(hidden=5120, inside=17408, layers=40, heads=40)
    return _internvl("internvl3_5_14b", "InternVL 3.5, InternViT 300M + Qwen3 14B", _SMALL, text)


def internvl3_5_38b() -> Recipe:
    """InternViT 6B, whose 25 heads no even tensor-parallel size divides, and Qwen3 32B."""
    text = _qwen3(hidden=5120, inside=25600, layers=64, heads=64)
    return _internvl("internvl3_5_38b", "InternVL 3.5, InternViT 6B + Qwen3 32B", _LARGE, text)


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
        "rms_norm_eps": 1e-6,
    }
    name, summary = "internvl3_8b", "InternVL 3, InternViT 300M + Qwen2.5 7B"
    return _internvl(name, summary, _SMALL, text, image_token=151667)


def _qwen3(*, hidden: int, inside: int, layers: int, heads: int) -> dict[str, Any]:
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
        "rms_norm_eps": 1e-6,
    }


def _internvl(
    name: str,
    summary: str,
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
        summary=summary,
        family="internvl",
        config=config,
        arguments=FINETUNING | {"lr": 1e-5, "seq_length": 8192},
        presets=presets_of("images"),
    )
