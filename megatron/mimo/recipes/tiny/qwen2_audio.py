"""The tiny twin of Qwen2-Audio."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import qwen2_audio_processor
from megatron.mimo.recipes.tiny.tasks import say_tones
from megatron.mimo.recipes.tiny.twin import twin


def qwen2_audio_tiny() -> Recipe:
    """The same, small enough to learn tones in seconds."""
    return twin(
        name="qwen2_audio_tiny",
        summary="Qwen2-Audio of 0.2 million parameters that names tones",
        family="qwen2_audio",
        processor=qwen2_audio_processor,
        make=say_tones,
        questions=32,
        answer_tokens=12,
    )
