"""The tiny twin of LLaVA 1.5."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import llava_processor
from megatron.mimo.recipes.tiny.tasks import say_digits
from megatron.mimo.recipes.tiny.twin import twin


def llava_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="llava_tiny",
        summary="LLaVA of 0.2 million parameters that reads scanned digits",
        family="llava",
        processor=llava_processor,
        make=say_digits,
        questions=32,
        answer_tokens=6,
    )
