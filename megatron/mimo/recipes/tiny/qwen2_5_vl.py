"""The tiny twin of Qwen2.5-VL."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import qwen2_5_vl_processor
from megatron.mimo.recipes.tiny.tasks import digits_or_clip
from megatron.mimo.recipes.tiny.twin import twin


def qwen2_5_vl_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="qwen2_5_vl_tiny",
        summary="Qwen2.5-VL of 0.2 million parameters, on digits in images and clips",
        family="qwen2_5_vl",
        processor=qwen2_5_vl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
    )
