"""Gemma 3: SigLIP, rows averaged over squares, and a Gemma whose image tokens see each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.encoders import PooledProjector
from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.config_fields import ModelFields, field_rules, parts_of
from megatron.mimo.models.common.family import Family, transformers_model
from megatron.mimo.models.common.keys import KeyEntry, KeyTable, Transposed
from megatron.mimo.models.common.language import (
    ROTARY_BUFFERS,
    language_entries,
    language_spec,
    text_config,
)
from megatron.mimo.models.common.llava_kind import MODULE_TREE, image_format
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, TINY_VISION, random_text
from megatron.mimo.models.common.vision_tower import (
    image_shape,
    tower_carried,
    tower_entries,
    tower_name,
    tower_spec,
)
from megatron.mimo.models.gemma3.sample import sample

__all__ = ["FAMILY"]

FIELDS = ModelFields(
    rules=field_rules(
        "vision_config text_config image_token_index mm_tokens_per_image tie_word_embeddings",
        aside="boi_token_index eoi_token_index",
    ),
    parts={
        "text_config": parts_of("gemma3_text"),
        "vision_config": parts_of("siglip_vision_model"),
    },
)

_IMAGES = "modality_submodules.images."
_LAST = -1  # all layers of the tower are read, and the norm behind them
_PAN_AND_SCAN = (
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


def language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    given = llava_kind.language(config)
    _squares(config)
    text, rows = config.text_config, config.mm_tokens_per_image
    if text.final_logit_softcapping is not None:
        raise UnsupportedError(
            f"config.json: text_config.final_logit_softcapping is {text.final_logit_softcapping}; "
            "expected null: a model of images in transformers caps no logits"
        )
    if "window_size" in given and text.sliding_window < rows:
        raise UnsupportedError(
            f"config.json: text_config.sliding_window is {text.sliding_window}; expected at least "
            f"mm_tokens_per_image, {rows}: the tokens of an image see each other in every layer"
        )
    # Transformer Engine's attention knows no tokens that see each other.
    return {**given, "transformer_impl": "local"}


def _squares(config: Any) -> tuple[int, int]:
    """Patches along the side of an image, and along that of the squares that become a row each."""
    vision, rows = config.vision_config, config.mm_tokens_per_image
    patches, side = vision.image_size // vision.patch_size, math.isqrt(max(rows, 0))
    if side < 1 or side**2 != rows or patches % side:
        raise UnsupportedError(
            f"config.json: mm_tokens_per_image is {rows}, and an image has {patches} x {patches} "
            "patches (vision_config's image_size and patch_size); expected the square of a number "
            f"that divides {patches}"
        )
    return patches, patches // side


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    vision, place = config.vision_config, places["images"]
    language = config_at(settings.transformer, place)
    patches, side = _squares(config)
    encoder = tower_spec(
        vision, language, place, feature_layer=_LAST, strategy="full", post_norm=True
    )
    projector = ModuleSpec(
        module=PooledProjector,
        params={
            "config": language,
            "grid": (patches, patches),
            "side": side,
            "input_size": vision.hidden_size,
            "output_size": language.hidden_size,
            "layernorm_epsilon": vision.layer_norm_eps,
            "pg_collection": place.groups,
        },
    )
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {tower_name(vision): encoder},
            "input_projections": [projector],
        },
    )
    return MimoModelConfig(
        language_model_spec=language_spec(
            settings, places.language, text_config(config), sees_spans=True
        ),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_index},
    )


def key_table(config: Any) -> KeyTable:
    """Parameter names, in the spelling of the hub, which transformers writes too."""
    vision, text = config.vision_config, text_config(config)
    encoder = f"{_IMAGES}encoders.{tower_name(vision)}."
    projector, theirs = f"{_IMAGES}input_projections.0.", "multi_modal_projector."
    head = "language_model.lm_head.weight"
    return KeyTable(
        entries=(
            *language_entries(text, model="language_model.model.", head="language_model."),
            *tower_entries(
                vision, feature_layer=_LAST, mimo=encoder, hf="vision_tower.", post_norm=True
            ),
            KeyEntry(mimo=f"{projector}norm.weight", hf=(f"{theirs}mm_soft_emb_norm.weight",)),
            KeyEntry(
                mimo=f"{projector}projector.linear_fc1.weight",
                hf=(f"{theirs}mm_input_projection_weight",),
                transform=Transposed(),
            ),
        ),
        carried=(
            *tower_carried(vision, feature_layer=_LAST, hf="vision_tower.", post_norm=True),
            *ROTARY_BUFFERS,
        ),
        aliases=(*MODULE_TREE, ("vision_tower.vision_model.", "vision_tower.")),
        tied=((head, "language_model.model.embed_tokens.weight"),)
        if config.tie_word_embeddings
        else (),
    )


def media(config: Any) -> Media:
    """One item is one image, or a crop of one; its rows see each other."""
    return Media(
        special_token_ids={"images": config.image_token_index},
        formats={"images": image_format(config)},
        spans=("images",),
        image_settings=_PAN_AND_SCAN,
    )


def tiny() -> Any:
    """SigLIP on 4 x 4 patches, which become 4 rows, and a Gemma with 2 layers, one in windows."""
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    sizes = {key: value for key, value in TINY_VISION.items() if key != "initializer_range"}
    return Gemma3Config(
        vision_config=SiglipVisionConfig(
            **sizes | {"image_size": 32}, vision_use_head=False, hidden_act="gelu_pytorch_tanh"
        ),
        text_config=Gemma3TextConfig(
            **TINY_TEXT,
            head_dim=24,
            query_pre_attn_scalar=20,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
        # Tied, random weights of so small a Gemma say one token again and again.
        tie_word_embeddings=False,
        architectures=["Gemma3ForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images with text before, between and behind them."""
    count = int(torch.randint(1, 4, (), generator=generator))
    around = [config.boi_token_index, config.eoi_token_index]
    placeholders = [config.image_token_index, *around]
    parts = [random_text(config, placeholders, generator)]
    for _ in range(count):
        rows = torch.full((config.mm_tokens_per_image,), config.image_token_index)
        first, last = (torch.tensor([token]) for token in around)
        parts += [first, rows, last, random_text(config, placeholders, generator)]
    tokens_1L = torch.cat(parts)[None]
    shape = (count, *image_shape(config.vision_config))
    return {
        "input_ids": tokens_1L,
        "pixel_values": torch.randn(*shape, generator=generator),
        "token_type_ids": (tokens_1L == config.image_token_index).long(),
    }


def reference(config: Any) -> nn.Module:
    """The model of transformers, whose projection begins with zeros there."""
    model = transformers_model(config)
    projection = model.get_parameter("model.multi_modal_projector.mm_input_projection_weight")
    nn.init.normal_(projection, std=config.text_config.initializer_range)
    return model


FAMILY = Family(
    name="gemma3",
    fields=FIELDS,
    language=language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    reference=reference,
)
