"""LLaVA: images of one size through CLIP or SigLIP, an MLP, and a language model."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.mimo.errors import InputError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.convert.keys import KeyTable, Row
from megatron.mimo.data import MediaFormat, MediaItem, Sample
from megatron.mimo.encoders import Projector
from megatron.mimo.models.config_fields import check_fields
from megatron.mimo.models.family import Family, Media
from megatron.mimo.models.language import (
    ROTARY_BUFFERS,
    language_arguments,
    language_rows,
    language_spec,
)
from megatron.mimo.models.llava_parts import LLAVA
from megatron.mimo.models.vision_tower import (
    image_shape,
    rows_per_image,
    tower_carried,
    tower_name,
    tower_rows,
    tower_spec,
)
from megatron.mimo.recipes.recipe import Stage

__all__ = [
    "FAMILY",
    "MODULE_TREE",
    "TINY_TEXT",
    "TINY_VISION",
    "arguments",
    "example_text",
    "example_tokens",
    "key_table",
    "labels_or",
    "projector_rows",
    "projector_spec",
    "read_tokens",
    "text_config",
    "tower_of",
]

_IMAGES = "modality_submodules.images."
MODULE_TREE = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)
"""Aliases: what transformers 5 calls parts in its module tree, and does not write itself."""


def text_config(config: Any) -> Any:
    """The language model's configuration, tied or not as the whole model's says."""
    text = copy.copy(config.text_config)
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def arguments(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    check_fields(config)
    return language_arguments(text_config(config))


def build(config: Any, args: Namespace, stage: Stage) -> MimoModelConfig:
    """The model for one stage."""
    language = language_spec(args, stage)
    encoder = tower_of(config, language.params["config"], stage)
    projector = projector_spec(config, language.params["config"], stage)
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {tower_name(config.vision_config): encoder},
            "input_projections": [projector],
        },
    )
    return MimoModelConfig(
        language_model_spec=language,
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_index},
    )


def tower_of(config: Any, language: TransformerConfig, stage: Stage) -> ModuleSpec:
    """The encoder of a LLaVA-like configuration."""
    return tower_spec(
        config.vision_config,
        language,
        stage,
        feature_layer=config.vision_feature_layer,
        strategy=config.vision_feature_select_strategy,
    )


def projector_spec(config: Any, language: TransformerConfig, stage: Stage) -> ModuleSpec:
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
            "pg_collection": stage.pg_collection,
        },
    )


def projector_rows(config: Any, *, mimo: str, hf: str) -> tuple[Row, ...]:
    """Parameter names of an MLP of a LLaVA-like configuration, below these prefixes."""
    kinds = ("weight", "bias") if config.multimodal_projector_bias else ("weight",)
    return tuple(
        Row(mimo=f"{mimo}linear_fc{number}.{kind}", hf=(f"{hf}linear_{number}.{kind}",))
        for number in (1, 2)
        for kind in kinds
    )


def key_table(config: Any, *, projector: str = "", more: tuple[Row, ...] = ()) -> KeyTable:
    """Parameter names of a LLaVA-like model.

    Args:
        config: its Hugging Face configuration.
        projector: where the projector is within our projection.
        more: rows of what LLaVA does not have.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    encoder = f"{_IMAGES}encoders.{tower_name(vision)}."
    projections = projector_rows(
        config, mimo=f"{_IMAGES}input_projections.0.{projector}", hf="multi_modal_projector."
    )
    language = language_rows(
        text_config(config), model="language_model.model.", head="language_model."
    )
    return KeyTable(
        rows=(
            *language,
            *tower_rows(vision, feature_layer=layer, mimo=encoder, hf="vision_tower."),
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


def media(config: Any) -> Media:
    """One item is one image."""
    vision = config.vision_config
    return Media(
        special_token_ids={"images": config.image_token_index},
        formats={
            "images": MediaFormat(
                encoder=tower_name(vision),
                inputs={"pixel_values": (torch.float32, image_shape(vision))},
            )
        },
    )


def read_tokens(
    features: Mapping[str, Tensor], *media: str, name: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The token ids [L] of one conversation, and those of its media arguments that it has.

    Args:
        features: in Hugging Face's form; an ``attention_mask`` that hides nothing is let through.
        media: names of the family's media arguments.
        name: of the sample, for errors.

    Raises:
        InputError: another batch size than 1, hidden tokens, unknown arguments.
    """
    given = dict(features)
    tokens, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if tokens is None or tokens.dim() != 2 or len(tokens) != 1:
        got = "missing" if tokens is None else f"of shape {list(tokens.shape)}"
        raise InputError(f"sample {name}: input_ids are {got}; expected one conversation, [1, L]")
    if mask is not None and not bool(mask.all()):
        raise InputError(
            f"sample {name}: attention_mask hides tokens; give one conversation without padding"
        )
    unknown = sorted(set(given) - set(media))
    if unknown:
        raise InputError(
            f"sample {name}: features {unknown} are not known to this model; expected input_ids "
            f"and {', '.join(media)}"
        )
    return tokens[0].long(), given


def labels_or(is_label: Tensor | None, tokens_L: Tensor, placeholder: int) -> Tensor:
    """``is_label``, or by default every token that is not a placeholder."""
    return tokens_L != placeholder if is_label is None else is_label


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids`` and ``pixel_values`` [images, C, height, width]."""
    tokens_L, given = read_tokens(features, "pixel_values", name=name)
    vision = config.vision_config
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    items = tuple(
        MediaItem(
            modality="images",
            encoder=tower_name(vision),
            inputs={"pixel_values": image_CHW.float()},
            rows=rows,
        )
        for image_CHW in given.get("pixel_values", ())
    )
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.image_token_index),
        media=items,
    )


def tiny() -> Any:
    """CLIP with 3 layers, of which features take 2, and LLaMA with 2."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        text_config=LlamaConfig(**TINY_TEXT),
        image_token_index=4,
        image_seq_length=9,
        architectures=["LlavaForConditionalGeneration"],
    )


TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.2,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,  # not what Megatron pads a vocabulary to
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images with text before, between and behind them."""
    vision = config.vision_config
    count = int(torch.randint(1, 4, (), generator=generator))
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    return {
        "input_ids": example_tokens(config, [rows] * count, generator),
        "pixel_values": torch.randn(count, *image_shape(vision), generator=generator),
    }


def example_text(config: Any, placeholders: Sequence[int], generator: Generator) -> Tensor:
    """[L]: one to seven random tokens, none of which is special."""
    text = config.text_config
    special = [*placeholders, text.pad_token_id, text.bos_token_id, text.eos_token_id]
    is_word_V = torch.ones(text.vocab_size, dtype=torch.bool)
    is_word_V[[token for token in special if isinstance(token, int)]] = False
    words_V = is_word_V.nonzero().flatten()
    length = int(torch.randint(1, 8, (), generator=generator))
    return words_V[torch.randint(len(words_V), (length,), generator=generator)]


def example_tokens(config: Any, rows: list[int], generator: Generator) -> Tensor:
    """[1, L]: random text around images of so many rows each."""
    parts = []
    for placeholders in [*rows, 0]:
        parts.append(example_text(config, [config.image_token_index], generator))
        parts.append(torch.full((placeholders,), config.image_token_index))
    return torch.cat(parts)[None]


FAMILY = Family(
    name="llava",
    arguments=arguments,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    assembly=LLAVA,
)
