"""Qwen3-VL: images and clips of any size through a vision transformer with deepstack, and a Qwen3.

What the dense models and those with experts have in common; ``moe`` is the family of the latter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data.model_inputs import Media
from megatron.mimo.models.common.config_fields import check_fields
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.language import language_arguments
from megatron.mimo.models.common.llava_kind import text_config
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, random_text
from megatron.mimo.models.common.visuals import IMAGE, VIDEO, patch_values, visual_media
from megatron.mimo.models.qwen3_vl.keys import key_table
from megatron.mimo.models.qwen3_vl.language import deepstack_spec
from megatron.mimo.models.qwen3_vl.sample import sample
from megatron.mimo.models.qwen3_vl.vision import ENCODER, vision_specs

__all__ = ["FAMILY", "TINY_PARTS", "qwen3_vl_family"]

# Two levels, one on each of two pipeline stages; heads of another size than derived.
TINY_PARTS: dict[str, Any] = {
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
        "out_hidden_size": 64,
        "initializer_range": 0.2,
    },
    "text_config": {
        **TINY_TEXT,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [4, 4, 4],
            "mrope_interleaved": True,
        },
    },
}
TINY_TOKENS: dict[str, Any] = {
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "image_token_id": 5,
    "video_token_id": 6,
}


def arguments(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    check_fields(config)
    text, vision = text_config(config), config.vision_config
    if vision.out_hidden_size != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}; expected "
            f"{text.hidden_size}, the language model's hidden size"
        )
    _check_levels(list(vision.deepstack_visual_indexes), vision.depth, text.num_hidden_layers)
    # The fused rotation takes no packed sequences, nor several samples with positions in 3 axes.
    return {**language_arguments(text), "apply_rope_fusion": False}


def _check_levels(given: list[int], depth: int, layers: int) -> None:
    """Refuse levels that no layer of the encoder gives, or no layer of the decoder takes."""
    if given != sorted(set(given)) or not set(given) <= set(range(depth)):
        raise ConfigError(
            f"vision_config.deepstack_visual_indexes is {given}; expected ascending numbers of the "
            f"encoder's layers, 0 to {depth - 1}"
        )
    if len(given) > layers:
        raise ConfigError(
            f"text_config.num_hidden_layers is {layers}; expected at least {len(given)}: "
            "vision_config.deepstack_visual_indexes gives each of so many layers rows to add"
        )


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules=vision_specs(
            config.vision_config, config_at(settings.transformer, place), place
        ),
    )
    return MimoModelConfig(
        language_model_spec=deepstack_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_id},
    )


def media(config: Any) -> Media:
    """One item is one image or clip; later stages add levels of its rows."""
    return visual_media(config, ENCODER, plan_on_every_stage=True)


def tiny() -> Any:
    """A Qwen3-VL of about 0.2 million parameters."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        **TINY_PARTS, **TINY_TOKENS, architectures=["Qwen3VLForConditionalGeneration"]
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images and clips with text before, between and behind them."""
    special = [
        *(config.image_token_id, config.video_token_id),
        *(config.vision_start_token_id, config.vision_end_token_id),
    ]
    around = torch.tensor(special[2:]).split(1)
    merge = config.vision_config.spatial_merge_size

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    tokens = [random_text(config, special, generator)]
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for _ in range(number(1, 4)):
        kind = VIDEO if number(0, 2) == 1 else IMAGE
        frames, most = (number(2, 4), 4) if kind == VIDEO else (1, 6)
        down, across = number(1, most), number(1, most)
        grids[kind].append([frames, down * merge, across * merge])
        for _ in range(frames):  # of a clip, each behind text that says when it is
            placeholders = torch.full((down * across,), special[kind - 1])
            text = random_text(config, special, generator)
            tokens += [text, around[0], placeholders, around[1]]
    tokens.append(random_text(config, special, generator))
    tokens_1L = torch.cat(tokens)[None]
    features = {
        "input_ids": tokens_1L,
        "mm_token_type_ids": (tokens_1L == special[0]).int() + 2 * (tokens_1L == special[1]).int(),
    }
    names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    values = patch_values(config.vision_config)
    for (pixels, grid), sizes in zip(names, grids.values(), strict=True):
        if sizes:
            features[grid] = torch.tensor(sizes)
            patches = int(features[grid].prod(dim=1).sum())
            features[pixels] = torch.randn(patches, values, generator=generator)
    return features


def qwen3_vl_family(name: str, tiny: Any) -> Family:
    """The family of this name; it has the tiny configuration of its own."""
    return Family(
        name=name,
        arguments=arguments,
        build=build,
        keys=key_table,
        media=media,
        sample=sample,
        tiny=tiny,
        example=example,
        placeholders=lambda config: {
            "images": config.image_token_id,
            "videos": config.video_token_id,
        },
    )


FAMILY = qwen3_vl_family("qwen3_vl", tiny)
