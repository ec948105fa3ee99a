"""LLaVA with ears: images through CLIP, audio through Whisper, MLPs, and LLaMA.

transformers has no such model; ``llava_avlm_reference`` is one, of its parts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from megatron.core.models.mimo import MimoModelConfig
from megatron.mimo.convert.keys import KeyTable
from megatron.mimo.data import MediaItem, Sample
from megatron.mimo.models import llava
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
from megatron.mimo.models.family import Family, Media
from megatron.mimo.models.llava_avlm_processor import LlavaAvlmProcessor
from megatron.mimo.models.llava_avlm_reference import (
    LlavaAvlmConfig,
    LlavaAvlmForConditionalGeneration,
)
from megatron.mimo.models.llava_parts import LLAVA_AVLM
from megatron.mimo.models.vision_tower import image_shape, rows_per_image
from megatron.mimo.recipes.recipe import Stage

__all__ = ["FAMILY", "LlavaAvlmProcessor"]  # the processor registers itself


def build(config: Any, args: Namespace, stage: Stage) -> MimoModelConfig:
    """The model for one stage: LLaVA's, and a second modality."""
    seeing = llava.build(config, args, stage)
    audio = audio_modality(
        config.audio_config,
        seeing.language_model_spec.params["config"],
        stage,
        activation=config.projector_hidden_act,
        bias=config.multimodal_projector_bias,
    )
    return MimoModelConfig(
        language_model_spec=seeing.language_model_spec,
        modality_submodules_spec={**seeing.modality_submodules_spec, "audio": audio},
        special_token_ids={**seeing.special_token_ids, "audio": config.audio_token_index},
    )


def key_table(config: Any) -> KeyTable:
    """Parameter names: LLaVA's, those of the audio tower and of its projector."""
    projector = llava.projector_rows(
        config, mimo=f"{AUDIO}input_projections.0.", hf="audio_projector."
    )
    tower = audio_rows(config.audio_config, mimo=f"{AUDIO}encoders.{ENCODER}.", hf="audio_tower.")
    return llava.key_table(config, more=(*tower, *projector))


def media(config: Any) -> Media:
    """One item is one image or one clip."""
    seeing = llava.media(config)
    return Media(
        special_token_ids={**seeing.special_token_ids, "audio": config.audio_token_index},
        formats={**seeing.formats, "audio": audio_format(config.audio_config)},
    )


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``pixel_values``, ``input_features`` and ``feature_attention_mask``."""
    clips = {
        key: value
        for key, value in features.items()
        if key in ("input_features", "feature_attention_mask")
    }
    rest = {key: value for key, value in features.items() if key not in clips}
    seen = llava.sample(config, rest, is_label=is_label, name=name)
    heard = audio_items(config.audio_config, clips, modality="audio", name=name)
    is_label_L = seen.is_label
    if is_label is None:
        is_label_L = is_label_L & (seen.token_ids != config.audio_token_index)
    return Sample(
        name=name,
        token_ids=seen.token_ids,
        is_label=is_label_L,
        media=_in_order(
            seen.token_ids,
            {config.image_token_index: seen.media, config.audio_token_index: heard},
        ),
    )


def _in_order(
    tokens_L: Tensor, media_of: Mapping[int, Sequence[MediaItem]]
) -> tuple[MediaItem, ...]:
    """Items by the place of their first placeholder; those that have none come last."""
    placed = []
    for token, items in media_of.items():
        places, used = torch.nonzero(tokens_L == token).flatten().tolist(), 0
        for item in items:
            placed.append((places[used] if used < len(places) else len(tokens_L), item))
            used += item.rows
    return tuple(item for _, item in sorted(placed, key=lambda pair: pair[0]))


def tiny() -> Any:
    """About 0.3 million parameters: CLIP with 3 layers, Whisper and LLaMA with 2."""
    from transformers import CLIPVisionConfig, LlamaConfig, WhisperConfig

    return LlavaAvlmConfig(
        vision_config=CLIPVisionConfig(**llava.TINY_VISION),
        audio_config=WhisperConfig(**TINY_AUDIO, init_std=0.2),
        text_config=LlamaConfig(**llava.TINY_TEXT),
        image_token_index=4,
        audio_token_index=5,
        architectures=["LlavaAvlmForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """Up to two images and two clips, in random order, with text around each."""
    counts = torch.randint(0, 3, (2,), generator=generator).tolist()
    features: dict[str, Tensor] = {}
    images, clips = [], []
    if counts[0]:
        shape = image_shape(config.vision_config)
        features["pixel_values"] = torch.randn(counts[0], *shape, generator=generator)
        rows = rows_per_image(config.vision_config, strategy=config.vision_feature_select_strategy)
        images = [torch.full((rows,), config.image_token_index)] * counts[0]
    if counts[1]:
        heard = example_audio(config.audio_config, counts[1], generator)
        features |= heard
        clips = [
            torch.full((rows_of_clip(config.audio_config, length),), config.audio_token_index)
            for length in heard["feature_attention_mask"].sum(dim=1).tolist()
        ]

    def text() -> Tensor:
        placeholders = [config.image_token_index, config.audio_token_index]
        return llava.example_text(config, placeholders, generator)

    parts = [text()]
    while images or clips:
        sees = bool(images) and (not clips or bool(torch.rand((), generator=generator) < 0.5))
        parts += [(images if sees else clips).pop(0), text()]
    return {"input_ids": torch.cat(parts)[None], **features}


def reference(config: Any) -> nn.Module:
    """The model of transformers' parts, with random weights."""
    model: nn.Module = LlavaAvlmForConditionalGeneration(config)
    return model


FAMILY = Family(
    name="llava_avlm",
    arguments=llava.arguments,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    reference=reference,
    assembly=LLAVA_AVLM,
)
