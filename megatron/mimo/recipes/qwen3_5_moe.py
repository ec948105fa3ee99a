"""Recipes of Qwen3.5 with experts: ``qwen3_5_35b_a3b``."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.qwen3_5 import LARGE, configuration
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING_LONG, presets_of


def qwen3_5_35b_a3b() -> Recipe:
    """Qwen3.5 35B-A3B: 256 experts in each layer, 8 for each token and one for all.

    Qwen3.6 35B-A3B has its sizes.
    """
    experts = {
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }

    def config() -> Any:
        from transformers import Qwen3_5MoeConfig

        return Qwen3_5MoeConfig(
            **configuration((40, 2048, 16, 2, 32), LARGE, **experts),
            tie_word_embeddings=False,
            architectures=["Qwen3_5MoeForConditionalGeneration"],
        )

    return pretrained(
        name="qwen3_5_35b_a3b",
        summary="Qwen3.5 35B-A3B, gated delta net, images and video",
        family="qwen3_5_moe",
        config=config,
        arguments=FINETUNING_LONG | {"moe_token_dispatcher_type": "alltoall"},
        presets=presets_of("images"),
    )
