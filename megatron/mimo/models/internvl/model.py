"""InternVL 3 and 3.5: tiles through InternViT, a pixel shuffle, an MLP, and a Qwen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data import MediaFormat
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.config_fields import ModelFields, field_rules, parts_of
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.keys import KeyTable
from megatron.mimo.models.common.language import (
    ROTARY_BUFFERS,
    language_entries,
    language_spec,
    text_config,
)
from megatron.mimo.models.common.llava_kind import MODULE_TREE
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, random_text
from megatron.mimo.models.internvl.sample import sample
from megatron.mimo.models.internvl.vision import (
    ENCODER,
    VISION_RULES,
    check_tiles,
    rows_per_tile,
    tile_shape,
    vision_carried,
    vision_entries,
    vision_specs,
)

__all__ = ["FAMILY"]

FIELDS = ModelFields(
    rules=field_rules(
        "vision_config text_config image_token_id downsample_ratio projector_hidden_act "
        "vision_feature_layer tie_word_embeddings",
        aside="image_seq_length",  # which follows from the tower
        only={"vision_feature_select_strategy": ("default",)},
    ),
    parts={
        "text_config": parts_of("qwen2", "qwen3", "qwen3_moe", "llama"),
        "vision_config": {"internvl_vision": VISION_RULES},
    },
)

_AROUND = (5, 6)  # tokens before and behind an image, in the tiny vocabulary


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    given = llava_kind.language(config)
    check_tiles(config)
    return given


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules=vision_specs(config, config_at(settings.transformer, place), place),
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_id},
    )


def key_table(config: Any) -> KeyTable:
    """Parameter names, in the spelling of the hub, which transformers writes too."""
    text = text_config(config)
    language = language_entries(text, model="language_model.model.", head="language_model.")
    tied = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    return KeyTable(
        entries=(*language, *vision_entries(config)),
        carried=(*vision_carried(config), *ROTARY_BUFFERS),
        aliases=MODULE_TREE,
        tied=(tied,) if config.tie_word_embeddings else (),
    )


def media(config: Any) -> Media:
    """One item is one image, or a frame of a clip: its tiles."""
    tiles = (None, *tile_shape(config.vision_config))
    inputs = {"pixel_values": (torch.float32, tiles)}
    return Media(
        special_token_ids={"images": config.image_token_id},
        formats={"images": MediaFormat(encoder=ENCODER, inputs=inputs)},
    )


def tiny() -> Any:
    """InternViT with 3 layers on tiles of 4 x 4 patches, which give 4 rows, and a Qwen3 with 2."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen3Config

    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            attention_bias=True,
            image_size=[32, 32],
            patch_size=[8, 8],
            initializer_range=0.2,
        ),
        text_config=Qwen3Config(**TINY_TEXT, head_dim=16),
        image_token_id=4,
        image_seq_length=4,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images of 1 to 5 tiles with text before, between and behind them."""
    count = int(torch.randint(1, 4, (), generator=generator))
    tiles = torch.randint(1, 6, (count,), generator=generator).tolist()
    placeholders = [config.image_token_id, *_AROUND]
    first, last = (torch.tensor([token]) for token in _AROUND)
    parts = [random_text(config, placeholders, generator)]
    for number in tiles:
        rows = torch.full((number * rows_per_tile(config),), config.image_token_id)
        parts += [first, rows, last, random_text(config, placeholders, generator)]
    shape = (sum(tiles), *tile_shape(config.vision_config))
    return {
        "input_ids": torch.cat(parts)[None],
        "pixel_values": torch.randn(*shape, generator=generator),
    }


FAMILY = Family(
    name="internvl",
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
)
