"""LLaVA-like models of parts: a language model, CLIP or SigLIP, and Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.models.parts import AUDIO, IMAGES, LANGUAGE, Assembly, Part, language_part
from megatron.mimo.models.vision_tower import image_shape, rows_per_image, tower_name

__all__ = ["LLAVA", "LLAVA_AVLM", "LLAVA_NEXT"]

_LANGUAGES = ("llama", "mistral", "qwen2")
_IMAGES = Part(
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
_AUDIO = Part(
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
# Tiles of a LLaVA-NeXT image, rows and columns, as it was published.
_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def _compose_llava(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    from transformers import LlavaConfig

    vision = _vision(parts)
    return LlavaConfig(
        image_seq_length=rows_per_image(vision, strategy=_strategy(vision)),
        architectures=["LlavaForConditionalGeneration"],
        **_common(parts, tokens),
    )


def _compose_llava_next(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    from transformers import LlavaNextConfig

    vision = _vision(parts)
    side = vision.image_size
    return LlavaNextConfig(
        image_seq_length=rows_per_image(vision, strategy=_strategy(vision)),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in _TILES],
        architectures=["LlavaNextForConditionalGeneration"],
        **_common(parts, tokens),
    )


def _compose_llava_avlm(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> Any:
    from megatron.mimo.models.llava_avlm_reference import LlavaAvlmConfig

    return LlavaAvlmConfig(
        audio_config=parts[AUDIO],
        audio_token_index=tokens[AUDIO],
        architectures=["LlavaAvlmForConditionalGeneration"],
        **_common(parts, tokens),
    )


def _common(parts: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
    text, vision = parts[LANGUAGE], _vision(parts)
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokens[IMAGES],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": _strategy(vision),
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": text.dtype,
    }


def _vision(parts: Mapping[str, Any]) -> Any:
    """The configuration of the part that sees, without that of the part that reads captions."""
    return getattr(parts[IMAGES], "vision_config", parts[IMAGES])


def _strategy(vision: Any) -> str:
    """CLIP's first row, of the class token, is left out; SigLIP has none."""
    return "default" if tower_name(vision) == "clip" else "full"


def _llava_processor(config: Any, read: Mapping[str, Any], template: str) -> Any:
    from transformers import LlavaProcessor

    _check_images(config.vision_config, read[IMAGES])
    return LlavaProcessor(
        image_processor=read[IMAGES], **_image_settings(config, read[LANGUAGE], template)
    )


def _llava_next_processor(config: Any, read: Mapping[str, Any], template: str) -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side, given = config.vision_config.image_size, read[IMAGES]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=given.image_mean,
        image_std=given.image_std,
        resample=given.resample,
    )
    return LlavaNextProcessor(
        image_processor=images, **_image_settings(config, read[LANGUAGE], template)
    )


def _llava_avlm_processor(config: Any, read: Mapping[str, Any], template: str) -> Any:
    from megatron.mimo.models.llava_avlm_processor import LlavaAvlmProcessor

    _check_images(config.vision_config, read[IMAGES])
    _check_audio(config.audio_config, read[AUDIO])
    return LlavaAvlmProcessor(
        image_processor=read[IMAGES],
        feature_extractor=read[AUDIO],
        tokenizer=read[LANGUAGE],
        patch_size=config.vision_config.patch_size,
        chat_template=template,
    )


def _image_settings(config: Any, tokenizer: Any, template: str) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(tower_name(config.vision_config) == "clip"),
        "chat_template": template,
    }


def _check_images(vision: Any, processor: Any) -> None:
    """Refuse an image processor that makes images of another size than the encoder takes."""
    import torch

    blank_CHW = torch.zeros(3, vision.image_size + 7, vision.image_size + 40, dtype=torch.uint8)
    made = tuple(processor(blank_CHW, return_tensors="pt")["pixel_values"].shape[1:])
    if made != image_shape(vision):
        raise InputError(
            f"part {IMAGES}: its processor makes images of {list(made)}, and its encoder takes "
            f"{list(image_shape(vision))}; correct size and crop_size in preprocessor_config.json"
        )


def _check_audio(audio: Any, extractor: Any) -> None:
    """Refuse a feature extractor whose windows are not those of the encoder."""
    made = [extractor.feature_size, extractor.nb_max_frames]
    taken = [audio.num_mel_bins, 2 * audio.max_source_positions]
    if made != taken:
        raise InputError(
            f"part {AUDIO}: its feature extractor makes {made} mel bins and frames of a clip, and "
            f"its encoder takes {taken}; they are not of one model: fetch preprocessor_config.json "
            "again"
        )


LLAVA = Assembly(
    parts={LANGUAGE: language_part(*_LANGUAGES), IMAGES: _IMAGES},
    compose=_compose_llava,
    processor=_llava_processor,
)
LLAVA_NEXT = Assembly(
    parts={LANGUAGE: language_part(*_LANGUAGES), IMAGES: _IMAGES},
    compose=_compose_llava_next,
    processor=_llava_next_processor,
)
LLAVA_AVLM = Assembly(
    parts={LANGUAGE: language_part("llama"), IMAGES: _IMAGES, AUDIO: _AUDIO},
    compose=_compose_llava_avlm,
    processor=_llava_avlm_processor,
)
