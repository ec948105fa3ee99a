"""Recipes of Qwen3-VL with experts: ``qwen3_vl_30b_a3b`` and ``qwen3_vl_235b_a22b``."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.qwen3_vl import LARGE, configuration
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of


def qwen3_vl_30b_a3b() -> Recipe:
    """Qwen3-VL 30B-A3B: 128 experts in each layer, 8 for each token."""
    return _with_experts("30b_a3b", (48, 2048, 6144, 32), 768)


def qwen3_vl_235b_a22b() -> Recipe:
    """Qwen3-VL 235B-A22B: 128 experts in each layer, 8 for each token."""
    return _with_experts("235b_a22b", (94, 4096, 12288, 64), 1536)


def _with_experts(size: str, text: tuple[int, int, int, int], inner: int) -> Recipe:
    """``text`` as of the dense models; ``inner`` is the width within an expert."""
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": inner}

    def config() -> Any:
        from transformers import Qwen3VLMoeConfig

        return Qwen3VLMoeConfig(
            **configuration(text, LARGE, num_key_value_heads=4, **experts),
            tie_word_embeddings=False,
            architectures=["Qwen3VLMoeForConditionalGeneration"],
        )

    return pretrained(
        name=f"qwen3_vl_{size}",
        summary=f"Qwen3-VL {size.upper().replace('_', '-')}, images and video",
        family="qwen3_vl_moe",
        config=config,
        arguments=FINETUNING_LONG | {"moe_token_dispatcher_type": "alltoall"},
        presets=presets_of("images"),
    )
