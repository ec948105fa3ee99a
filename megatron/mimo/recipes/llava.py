"""Recipes ``llava_1_5_7b``, ``llava_1_5_13b`` and ``llava_tiny``.

Sizes and training settings are those that LLaVA 1.5 was published with: first the projector
alone, on captions; then projector and language model, on instructions.
"""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.pretrained import pretrained
from megatron.mimo.recipes.published import clip_large, vicuna
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.settings import FINETUNING, presets_of

_PASS = {"train_iters": 5200}  # one pass over 665 thousand instructions


def llava_1_5_7b() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels and Vicuna 7B."""
    return _llava("llava_1_5_7b", "LLaVA 1.5, CLIP + Vicuna 7B", 4096, 11008, 32, 32)


def llava_1_5_13b() -> Recipe:
    """CLIP ViT-L/14 at 336 pixels and Vicuna 13B."""
    return _llava("llava_1_5_13b", "LLaVA 1.5, CLIP + Vicuna 13B", 5120, 13824, 40, 40)


def _llava(name: str, summary: str, hidden: int, ffn: int, layers: int, heads: int) -> Recipe:
    def config() -> Any:
        from transformers import LlavaConfig

        return LlavaConfig(
            vision_config=clip_large(),
            text_config=vicuna(
                hidden_size=hidden,
                intermediate_size=ffn,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                pad_token_id=32001,
            ),
            image_token_index=32000,
            image_seq_length=576,
            architectures=["LlavaForConditionalGeneration"],
        )

    return pretrained(
        name=name,
        summary=summary,
        family="llava",
        config=config,
        arguments=FINETUNING | _PASS,
        presets=presets_of("images"),
    )
