"""LLaVA-NeXT: LLaVA for images of any resolution, seen as a whole and in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data import MediaFormat
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.encoders import AnyResolutionSubmodules, NewlineProjection
from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.config_fields import ModelFields, field_rules, parts_of
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.language import language_spec, text_config
from megatron.mimo.models.common.llava_kind import (
    CLIP_OR_SIGLIP,
    LLAVA_FIELDS,
    image_encoders,
    projector_spec,
)
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION, random_text_with_images
from megatron.mimo.models.common.vision_tower import image_shape, tower_name
from megatron.mimo.models.llava_next.assembly import ASSEMBLY
from megatron.mimo.models.llava_next.keys import key_table
from megatron.mimo.models.llava_next.sample import sample
from megatron.mimo.models.llava_next.tiles import (
    Size,
    check_resolutions,
    row_sources,
    side_in_patches,
    tiles_of,
)

__all__ = ["FAMILY"]

FIELDS = ModelFields(
    rules=field_rules(f"{LLAVA_FIELDS} image_grid_pinpoints", aside="image_seq_length"),
    parts={
        "text_config": parts_of("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
        "vision_config": CLIP_OR_SIGLIP,
    },
)


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    check_resolutions(config)
    return llava_kind.language(config)


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    side_in_patches(config)
    place = places["images"]
    language = config_at(settings.transformer, place)
    projection = ModuleSpec(
        module=NewlineProjection,
        params={"config": language, "projector": projector_spec(config, language, place)},
    )
    images = ModuleSpec(
        module=AnyResolutionSubmodules,
        submodules={
            "encoders": image_encoders(config, language, place),
            "input_projections": [projection],
        },
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_index},
    )


def media(config: Any) -> Media:
    """One item is one image: its tiles, the first of which is the whole image made small."""
    vision = config.vision_config
    inputs = {
        "pixel_values": (torch.float32, (None, *image_shape(vision))),
        "row_sources": (torch.int64, (None,)),
    }
    return Media(
        special_token_ids={"images": config.image_token_index},
        formats={"images": MediaFormat(encoder=tower_name(vision), inputs=inputs)},
    )


def tiny() -> Any:
    """CLIP as in LLaVA's, for up to 2 x 2 tiles, and Mistral with 2 layers."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        text_config=MistralConfig(**TINY_TEXT, sliding_window=None),
        image_token_index=4,
        image_seq_length=9,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24]],
        architectures=["LlavaNextForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images of different sizes with text before, between and behind them."""
    count = int(torch.randint(1, 4, (), generator=generator))
    side = config.vision_config.image_size
    sizes_N2 = torch.randint(side // 3, 3 * side, (count, 2), generator=generator)
    sizes: list[Size] = [(size[0], size[1]) for size in sizes_N2.tolist()]
    tiles = [rows * columns + 1 for rows, columns in (tiles_of(config, size) for size in sizes)]
    shape = (count, max(tiles), *image_shape(config.vision_config))
    rows = [len(row_sources(config, size)) for size in sizes]
    return {
        "input_ids": random_text_with_images(config, rows, generator),
        "pixel_values": torch.randn(*shape, generator=generator),
        "image_sizes": sizes_N2,
    }


FAMILY = Family(
    name="llava_next",
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    assembly=ASSEMBLY,
)
