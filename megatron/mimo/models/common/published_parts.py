"""Parts that LLaVA-like models take from separately published ones: CLIP or SigLIP, and Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.models.common.assembly import AUDIO, IMAGES, LANGUAGE, Part
from megatron.mimo.models.common.vision_tower import image_shape, tower_name

__all__ = [
    "AUDIO_PART",
    "IMAGES_PART",
    "check_audio",
    "check_images",
    "common_settings",
    "image_settings",
    "select_strategy",
    "vision_of",
]


IMAGES_PART = Part(
    kinds=("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
    prefixes=(("vision_model.", "vision_tower."), ("", "vision_tower.")),
    unused=(
        "text_model.*",
        "text_projection.*",
        "visual_projection.*",
        "logit_scale",
        "logit_bias",
        "*embeddings.position_ids",
    ),
    reader="AutoImageProcessor",
    token="<image>",
)


AUDIO_PART = Part(
    kinds=("whisper",),
    prefixes=(
        ("model.encoder.", "audio_tower."),
        ("encoder.", "audio_tower."),
        ("", "audio_tower."),
    ),
    unused=("model.decoder.*", "decoder.*", "proj_out.*"),
    reader="AutoFeatureExtractor",
    token="<audio>",
)


def common_settings(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    """Fields of the whole's configuration that every LLaVA-like model has."""
    text, vision = parts[LANGUAGE], vision_of(parts)
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokens[IMAGES],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": select_strategy(vision),
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": text.dtype,
    }


def vision_of(parts: Mapping[str, Any]) -> Any:
    """The configuration of the vision tower, also where the part has a text model beside it."""
    return getattr(parts[IMAGES], "vision_config", parts[IMAGES])


def select_strategy(vision: Any) -> str:
    """CLIP's first row, of the class token, is left out; SigLIP has none."""
    return "default" if tower_name(vision) == "clip" else "full"


def image_settings(config: Any, tokenizer: Any, template: str) -> dict[str, Any]:
    """Arguments that the processors of LLaVA and LLaVA-NeXT share."""
    return {
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(tower_name(config.vision_config) == "clip"),
        "chat_template": template,
    }


def check_images(vision: Any, processor: Any) -> None:
    """Refuse an image processor that makes images of another size than the encoder takes."""
    blank_CHW = torch.zeros(3, vision.image_size + 7, vision.image_size + 40, dtype=torch.uint8)
    made = tuple(processor(blank_CHW, return_tensors="pt")["pixel_values"].shape[1:])
    if made != image_shape(vision):
        raise InputError(
            f"part {IMAGES}: its processor makes images of {list(made)}, and its encoder takes "
            f"{list(image_shape(vision))}; correct size and crop_size in preprocessor_config.json"
        )


def check_audio(audio: Any, extractor: Any) -> None:
    """Refuse a feature extractor whose windows are not those of the encoder."""
    made = [extractor.feature_size, extractor.nb_max_frames]
    taken = [audio.num_mel_bins, 2 * audio.max_source_positions]
    if made != taken:
        raise InputError(
            f"part {AUDIO}: its feature extractor makes {made} mel bins and frames of a clip, and "
            f"its encoder takes {taken}; they are not of one model: fetch preprocessor_config.json "
            "again"
        )
