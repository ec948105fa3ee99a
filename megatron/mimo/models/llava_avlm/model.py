"""LLaVA with ears: images through CLIP, audio through Whisper, MLPs, and LLaMA.

transformers has no such model; ``reference`` is one, of its parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
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
from megatron.mimo.models.common.language import language_spec, text_config
from megatron.mimo.models.common.llava_kind import (
    CLIP_OR_SIGLIP,
    LLAVA_FIELDS,
    image_encoders,
    image_format,
    language,
    projector_spec,
)
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION, random_text
from megatron.mimo.models.common.vision_tower import image_shape, rows_per_image
from megatron.mimo.models.llava_avlm.assembly import ASSEMBLY
from megatron.mimo.models.llava_avlm.keys import key_table
from megatron.mimo.models.llava_avlm.processor import LlavaAvlmProcessor
from megatron.mimo.models.llava_avlm.reference import (
    LlavaAvlmConfig,
    LlavaAvlmForConditionalGeneration,
)
from megatron.mimo.models.llava_avlm.sample import sample

__all__ = ["FAMILY", "LlavaAvlmProcessor"]  # the processor registers itself

FIELDS = ModelFields(
    rules=field_rules(f"{LLAVA_FIELDS} audio_config audio_token_index"),
    parts={
        "text_config": parts_of("llama"),
        "vision_config": CLIP_OR_SIGLIP,
        "audio_config": parts_of("whisper"),
    },
)


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    megatron = config_at(settings.transformer, place)
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": image_encoders(config, megatron, place),
            "input_projections": [projector_spec(config, megatron, place)],
        },
    )
    audio = audio_modality(
        config.audio_config,
        config_at(settings.transformer, places["audio"]),
        places["audio"],
        activation=config.projector_hidden_act,
        bias=config.multimodal_projector_bias,
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images, "audio": audio},
        special_token_ids=_placeholders(config),
    )


def _placeholders(config: Any) -> dict[str, int]:
    return {"images": config.image_token_index, "audio": config.audio_token_index}


def media(config: Any) -> Media:
    """One item is one image or one clip."""
    return Media(
        special_token_ids=_placeholders(config),
        formats={"images": image_format(config), "audio": audio_format(config.audio_config)},
    )


def tiny() -> Any:
    """About 0.3 million parameters: CLIP with 3 layers, Whisper and LLaMA with 2."""
    from transformers import CLIPVisionConfig, LlamaConfig, WhisperConfig

    return LlavaAvlmConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        audio_config=WhisperConfig(**TINY_AUDIO, init_std=0.2),
        text_config=LlamaConfig(**TINY_TEXT),
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
        return random_text(config, placeholders, generator)

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
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    reference=reference,
    assembly=ASSEMBLY,
)
