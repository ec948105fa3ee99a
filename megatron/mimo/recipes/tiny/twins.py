"""The tiny twins of the recipes of pretrained models: one function each."""

from __future__ import annotations

from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.recipes.tiny.processors import (
    gemma3_processor,
    internvl_processor,
    llava_avlm_processor,
    llava_next_processor,
    llava_processor,
    qwen2_5_vl_processor,
    qwen2_audio_processor,
)
from megatron.mimo.recipes.tiny.tasks import (
    digits_or_clip,
    say_digits,
    say_tones,
    say_tones_and_digits,
)
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


def llava_next_tiny() -> Recipe:
    """The same, small enough to learn digits in seconds."""
    return twin(
        name="llava_next_tiny",
        summary="LLaVA 1.6 of 0.2 million parameters that reads scanned digits",
        family="llava_next",
        processor=llava_next_processor,
        make=say_digits,
        questions=32,
        answer_tokens=6,
        seq_length=160,  # up to two images of five tiles
    )


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
