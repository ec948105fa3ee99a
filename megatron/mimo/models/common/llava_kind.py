"""Models in LLaVA's manner: CLIP or SigLIP, an MLP, and a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.data import MediaFormat, MediaItem
from megatron.mimo.encoders import Projector
from megatron.mimo.models.common.config_fields import parts_of
from megatron.mimo.models.common.keys import KeyEntry, KeyTable
from megatron.mimo.models.common.language import (
    ROTARY_BUFFERS,
    language_arguments,
    language_entries,
    text_config,
)
from megatron.mimo.models.common.place import Place
from megatron.mimo.models.common.vision_tower import (
    image_items,
    image_shape,
    rows_per_image,
    tower_carried,
    tower_entries,
    tower_name,
    tower_spec,
)

__all__ = [
    "CLIP_OR_SIGLIP",
    "LLAVA_FIELDS",
    "MODULE_TREE",
    "conversation_images",
    "image_encoders",
    "image_format",
    "key_table",
    "language",
    "projector_entries",
    "projector_spec",
]

LLAVA_FIELDS = (
    "vision_config text_config image_token_index projector_hidden_act "
    "vision_feature_select_strategy vision_feature_layer multimodal_projector_bias "
    "tie_word_embeddings"
)
"""Fields of a LLaVA-like configuration that are used. How many rows an image gives is none of
them: that follows from the tower."""

CLIP_OR_SIGLIP = parts_of("clip_vision_model", "siglip_vision_model")

_IMAGES = "modality_submodules.images."

MODULE_TREE = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)
"""Aliases: names of parts in the module tree of transformers 5, which files do not have."""


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    return language_arguments(text_config(config))


def image_encoders(config: Any, language: TransformerConfig, place: Place) -> dict[str, ModuleSpec]:
    """The encoder of a LLaVA-like configuration, by its name."""
    encoder = tower_spec(
        config.vision_config,
        language,
        place,
        feature_layer=config.vision_feature_layer,
        strategy=config.vision_feature_select_strategy,
    )
    return {tower_name(config.vision_config): encoder}


def projector_spec(config: Any, language: TransformerConfig, place: Place) -> ModuleSpec:
    """The MLP of a LLaVA-like configuration."""
    layers = config.vision_feature_layer
    return ModuleSpec(
        module=Projector,
        params={
            "config": language,
            "input_size": config.vision_config.hidden_size
            * (1 if isinstance(layers, int) else len(layers)),
            "output_size": language.hidden_size,
            "activation": config.projector_hidden_act,
            "bias": config.multimodal_projector_bias,
            "pg_collection": place.groups,
        },
    )


def projector_entries(config: Any, *, mimo: str, hf: str) -> tuple[KeyEntry, ...]:
    """Parameter names of an MLP of a LLaVA-like configuration, below these prefixes."""
    kinds = ("weight", "bias") if config.multimodal_projector_bias else ("weight",)
    return tuple(
        KeyEntry(mimo=f"{mimo}linear_fc{number}.{kind}", hf=(f"{hf}linear_{number}.{kind}",))
        for number in (1, 2)
        for kind in kinds
    )


def key_table(config: Any, *, projector: str = "", more: tuple[KeyEntry, ...] = ()) -> KeyTable:
    """Parameter names of a LLaVA-like model.

    Args:
        config: its Hugging Face configuration.
        projector: where the projector is within our projection.
        more: entries of what LLaVA does not have.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    encoder = f"{_IMAGES}encoders.{tower_name(vision)}."
    projections = projector_entries(
        config, mimo=f"{_IMAGES}input_projections.0.{projector}", hf="multi_modal_projector."
    )
    language = language_entries(
        text_config(config), model="language_model.model.", head="language_model."
    )
    return KeyTable(
        entries=(
            *language,
            *tower_entries(vision, feature_layer=layer, mimo=encoder, hf="vision_tower."),
            *projections,
            *more,
        ),
        carried=(
            *tower_carried(vision, feature_layer=layer, hf="vision_tower."),
            *ROTARY_BUFFERS,
        ),
        aliases=(
            *MODULE_TREE,
            # What transformers 4 wrote.
            ("vision_tower.vision_model.", "vision_tower."),
        ),
        tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),)
        if config.tie_word_embeddings
        else (),
    )


def image_format(config: Any) -> MediaFormat:
    """One item is one image."""
    vision = config.vision_config
    return MediaFormat(
        encoder=tower_name(vision), inputs={"pixel_values": (torch.float32, image_shape(vision))}
    )


def conversation_images(config: Any, features: Mapping[str, Tensor]) -> tuple[MediaItem, ...]:
    """The images of one conversation, ``pixel_values`` [images, C, height, width] if it has any."""
    vision = config.vision_config
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    return image_items(features.get("pixel_values", ()), encoder=tower_name(vision), rows=rows)
