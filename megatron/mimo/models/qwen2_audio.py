"""Qwen2-Audio: clips of any length through a Whisper-like encoder, a linear layer, and Qwen2."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig
from megatron.mimo.convert.keys import KeyTable, Row
from megatron.mimo.data import Sample
from megatron.mimo.models.audio_tower import (
    AUDIO,
    ENCODER,
    TINY_AUDIO,
    audio_format,
    audio_items,
    audio_modality,
    audio_rows,
    example_audio,
    rows_of_clip,
)
from megatron.mimo.models.config_fields import check_fields
from megatron.mimo.models.family import Family, Media
from megatron.mimo.models.language import (
    ROTARY_BUFFERS,
    language_arguments,
    language_rows,
    language_spec,
)
from megatron.mimo.models.llava import (
    MODULE_TREE,
    TINY_TEXT,
    example_text,
    labels_or,
    read_tokens,
)
from megatron.mimo.recipes.recipe import Stage

__all__ = ["FAMILY"]


def text_config(config: Any) -> Any:
    """The language model's configuration; Hugging Face's model never ties its output layer."""
    text = copy.copy(config.text_config)
    text.tie_word_embeddings = False
    return text


def arguments(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    check_fields(config)
    return language_arguments(text_config(config))


def build(config: Any, args: Namespace, stage: Stage) -> MimoModelConfig:
    """The model for one stage."""
    language = language_spec(args, stage)
    audio = audio_modality(config.audio_config, language.params["config"], stage, num_layers=1)
    return MimoModelConfig(
        language_model_spec=language,
        modality_submodules_spec={"audio": audio},
        special_token_ids={"audio": config.audio_token_index},
    )


def key_table(config: Any) -> KeyTable:
    """Parameter names."""
    projector = tuple(
        Row(
            mimo=f"{AUDIO}input_projections.0.linear_fc1.{kind}",
            hf=(f"multi_modal_projector.linear.{kind}",),
        )
        for kind in ("weight", "bias")
    )
    return KeyTable(
        rows=(
            *language_rows(
                text_config(config), model="language_model.model.", head="language_model."
            ),
            *audio_rows(config.audio_config, mimo=f"{AUDIO}encoders.{ENCODER}.", hf="audio_tower."),
            *projector,
        ),
        carried=ROTARY_BUFFERS,
        # transformers 5.20 saves its language model under one `model.` too many.
        aliases=(*MODULE_TREE, ("language_model.model.model.", "language_model.model.")),
    )


def media(config: Any) -> Media:
    """One item is one clip."""
    return Media(
        special_token_ids={"audio": config.audio_token_index},
        formats={"audio": audio_format(config.audio_config)},
    )


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids``, ``input_features`` and ``feature_attention_mask``."""
    tokens_L, given = read_tokens(features, "input_features", "feature_attention_mask", name=name)
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.audio_token_index),
        media=audio_items(config.audio_config, given, modality="audio", name=name),
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
        parts.append(example_text(config, [token], generator))
        if length is not None:
            parts.append(torch.full((rows_of_clip(config.audio_config, length),), token))
    return {"input_ids": torch.cat(parts)[None], **clips}


FAMILY = Family(
    name="qwen2_audio",
    arguments=arguments,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
)
