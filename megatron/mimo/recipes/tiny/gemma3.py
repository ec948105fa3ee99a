"""The tiny twin of Gemma 3."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import gemma3_processor
from megatron.mimo.recipes.tiny.tasks import say_digits
from megatron.mimo.recipes.tiny.twin import twin


def gemma3_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="gemma3_tiny",
        summary="Gemma 3 of 0.2 million parameters that reads scanned digits",
        family="gemma3",
        processor=gemma3_processor,
        make=say_digits,
        questions=32,
        answer_tokens=6,
        seq_length=192,  # up to two images of three crops, with what is said of them
    )
