"""The tiny twin of InternVL 3 and 3.5."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import internvl_processor
from megatron.mimo.recipes.tiny.tasks import digits_or_clip
from megatron.mimo.recipes.tiny.twin import twin


def internvl_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="internvl_tiny",
        summary="InternVL 3.5 of 0.2 million parameters that reads digits in images and clips",
        family="internvl",
        processor=internvl_processor,
        make=digits_or_clip,
        questions=32,
        answer_tokens=6,
        seq_length=128,  # up to two images of five tiles, or six frames and their names
    )
