"""The tiny twin of LLaVA with ears."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import llava_avlm_processor
from megatron.mimo.recipes.tiny.tasks import say_tones_and_digits
from megatron.mimo.recipes.tiny.twin import twin


def llava_avlm_tiny() -> Recipe:
    """The same, small enough to learn digits and tones in seconds."""
    return twin(
        name="llava_avlm_tiny",
        summary="LLaVA with ears of 0.3 million parameters: digits and tones",
        family="llava_avlm",
        processor=llava_avlm_processor,
        make=say_tones_and_digits,
        questions=32,
        answer_tokens=10,
    )
