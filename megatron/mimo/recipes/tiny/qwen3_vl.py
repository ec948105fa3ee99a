"""The tiny twins of Qwen3-VL, dense and with experts."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import qwen3_vl_processor
from megatron.mimo.recipes.tiny.tasks import digits_or_clip
from megatron.mimo.recipes.tiny.twin import twin


def qwen3_vl_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="qwen3_vl_tiny",
        summary="Qwen3-VL of 0.2 million parameters, on digits in images and clips",
        family="qwen3_vl",
        processor=qwen3_vl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
    )


def qwen3_vl_moe_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="qwen3_vl_moe_tiny",
        summary="Qwen3-VL of 0.3 million parameters, most of them in experts, on digits",
        family="qwen3_vl_moe",
        processor=qwen3_vl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
    )
