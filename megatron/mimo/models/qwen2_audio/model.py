"""Qwen2-Audio: clips of any length through a Whisper-like encoder, a linear layer, and Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.models.common.audio_tower import (
    TINY_AUDIO,
    audio_format,
    audio_modality,
    example_audio,
    rows_of_clip,
)
from megatron.mimo.models.common.config_fields import ModelFields, field_rules, parts_of
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.language import language_arguments, language_spec
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, random_text
from megatron.mimo.models.qwen2_audio.keys import key_table, text_config
from megatron.mimo.models.qwen2_audio.sample import sample

__all__ = ["FAMILY"]

FIELDS = ModelFields(
    rules=field_rules("audio_config text_config audio_token_index"),
    parts={
        "text_config": parts_of("llama", "mistral", "qwen2"),
        "audio_config": parts_of("qwen2_audio_encoder"),
    },
)


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    return language_arguments(text_config(config))


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    audio = audio_modality(
        config.audio_config,
        config_at(settings.transformer, places["audio"]),
        places["audio"],
        num_layers=1,
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"audio": audio},
        special_token_ids={"audio": config.audio_token_index},
    )


def media(config: Any) -> Media:
    """One item is one clip."""
    return Media(
        special_token_ids={"audio": config.audio_token_index},
        formats={"audio": audio_format(config.audio_config)},
    )


def tiny() -> Any:
    """A Qwen2-Audio of about 0.1 million parameters that hears 0.6 seconds."""
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2Config

    return Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**TINY_AUDIO, initializer_range=0.2),
        text_config=Qwen2Config(**TINY_TEXT),
        audio_token_index=4,
        architectures=["Qwen2AudioForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three clips of different lengths with text before, between and behind them."""
    count = int(torch.randint(1, 4, (), generator=generator))
    clips = example_audio(config.audio_config, count, generator)
    # At least half the window in one clip: transformers takes placeholders that all stand alone
    # for ones that it has to expand.
    clips["feature_attention_mask"][0, : config.audio_config.max_source_positions] = 1
    token, parts = config.audio_token_index, []
    for length in [*clips["feature_attention_mask"].sum(dim=1).tolist(), None]:
        parts.append(random_text(config, [token], generator))
        if length is not None:
            parts.append(torch.full((rows_of_clip(config.audio_config, length),), token))
    return {"input_ids": torch.cat(parts)[None], **clips}


FAMILY = Family(
    name="qwen2_audio",
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
)
