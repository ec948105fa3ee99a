"""The tiny twins of Qwen3.5, dense and with experts."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import qwen3_vl_processor
from megatron.mimo.recipes.tiny.tasks import digits_or_clip
from megatron.mimo.recipes.tiny.twin import twin


def qwen3_5_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="qwen3_5_tiny",
        summary="Qwen3.5 of 0.3 million parameters, on digits in images and clips",
        family="qwen3_5",
        processor=qwen3_vl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
    )


def qwen3_5_moe_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="qwen3_5_moe_tiny",
        summary="Qwen3.5 of 0.4 million parameters, most of them in experts, on digits",
        family="qwen3_5_moe",
        processor=qwen3_vl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
    )
