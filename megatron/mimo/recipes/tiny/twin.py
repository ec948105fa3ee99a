"""The tiny twin of a recipe: its family's small configuration, and conversations made by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.mimo.models import load_family
from megatron.mimo.recipes.pretrained import Task, pretrained
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.settings import TINY_ARGUMENTS, TINY_PRESETS
from megatron.mimo.recipes.tiny.tasks import Made, Maker

__all__ = ["twin"]


def twin(
    *,
    name: str,
    summary: str,
    family: str,
    processor: Callable[[Any], Any],
    make: Maker,
    questions: int,
    answer_tokens: int,
    **arguments: object,
) -> Recipe:
    """A recipe that needs no file and trains on a CPU in seconds, by the code of the real ones.

    Args:
        name: of the recipe.
        summary: one line.
        family: of ``megatron.mimo.models``.
        processor: makes the processor of the family's tiny configuration.
        make: makes a conversation of its number.
        questions: held-out conversations that are answered at the end.
        answer_tokens: no answer has more, its end included.
        arguments: what differs from ``TINY_ARGUMENTS``.
    """
    return pretrained(
        name=name,
        summary=summary,
        family=family,
        config=load_family(family).tiny,
        arguments=TINY_ARGUMENTS | arguments,
        presets=TINY_PRESETS,
        processor=processor,
        task=Task(
            train=lambda: Made(make, 4096, held_out=False),
            valid=lambda: Made(make, questions, held_out=True),
            answer_tokens=answer_tokens,
        ),
    )
