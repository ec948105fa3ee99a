"""Qwen2.5-VL: images and clips of any size through a windowed vision transformer, and a Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.data.media.image_sizes import Size
from megatron.mimo.models.common.family import Family
from megatron.mimo.models.common.language import language_spec, text_config
from megatron.mimo.models.common.place import Places, config_at
from megatron.mimo.models.common.settings import LanguageSettings
from megatron.mimo.models.common.tiny import TINY_TEXT, random_text
from megatron.mimo.models.common.visuals import (
    random_features,
    visual_fields,
    visual_language,
    visual_media,
    visual_placeholders,
)
from megatron.mimo.models.qwen2_5_vl.keys import key_table
from megatron.mimo.models.qwen2_5_vl.sample import sample
from megatron.mimo.models.qwen2_5_vl.vision import ENCODER, VISION_RULES, vision_specs

__all__ = ["FAMILY"]


def build(config: Any, settings: LanguageSettings, places: Places) -> MimoModelConfig:
    """The model of one rank."""
    place = places["images"]
    language = config_at(settings.transformer, place)
    images = ModuleSpec(
        module=VisionModalitySubmodules,
        submodules=vision_specs(config.vision_config, language, place),
    )
    return MimoModelConfig(
        language_model_spec=language_spec(settings, places.language, text_config(config)),
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_id},
    )


def media(config: Any) -> Media:
    """One item is one image or clip."""
    return visual_media(config, ENCODER)


def tiny() -> Any:
    """A Qwen2.5-VL of about 0.2 million parameters, with windows of 2 x 2 squares."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "out_hidden_size": 64,
            "initializer_range": 0.2,
        },
        text_config={
            **TINY_TEXT,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images and clips with text before, between and behind them."""
    placeholders = [config.image_token_id, config.video_token_id]
    around = [config.vision_start_token_id, config.vision_end_token_id]

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def text() -> Tensor:
        return random_text(config, [*placeholders, *around], generator)

    tokens = [text()]
    grids: dict[int, list[list[int]]] = {token: [] for token in placeholders}
    for _ in range(number(1, 4)):
        is_video = number(0, 2) == 1
        placeholder = config.video_token_id if is_video else config.image_token_id
        # Sides of 1 to 5 squares: less than a window, and no multiple of one.
        frames, most = (number(2, 4), 4) if is_video else (1, 6)
        down, across = number(1, most), number(1, most)
        merge = config.vision_config.spatial_merge_size
        grids[placeholder].append([frames, down * merge, across * merge])
        tokens += [
            torch.tensor(around[:1]),
            torch.full((frames * down * across,), placeholder),
            torch.tensor(around[1:]),
            text(),
        ]
    features = random_features(config, torch.cat(tokens), tuple(grids.values()), generator)
    clips = len(grids[config.video_token_id])
    if clips:
        # Fractions, so that positions are rounded.
        features["second_per_grid_ts"] = 0.3 + torch.rand(clips, generator=generator)
    return features


def resized(processor: Any, size: Size) -> Size:
    """The size to which the processor resizes an image: boxes are in pixels of it."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images, (width, height) = processor.image_processor, size
    edges = images.size
    height, width = smart_resize(
        height,
        width,
        factor=images.patch_size * images.merge_size,
        min_pixels=edges["shortest_edge"],
        max_pixels=edges["longest_edge"],
    )
    return width, height


FAMILY = Family(
    name="qwen2_5_vl",
    fields=visual_fields("qwen2_5_vl", VISION_RULES),
    language=visual_language,
    build=build,
    keys=key_table,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    placeholders=visual_placeholders,
    box_units=resized,
)
