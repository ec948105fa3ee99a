"""Processors for the tiny configurations of the families, made without any file."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.templates import (
    GEMMA_TEMPLATE,
    INTERNVL_TEMPLATE,
    LLAVA_TEMPLATE,
    QWEN_TEMPLATE,
)
from megatron.mimo.recipes.tiny.tasks import QUESTIONS, TONE_RATE
from megatron.mimo.recipes.tiny.tokenizer import tiny_tokenizer

__all__ = [
    "gemma3_processor",
    "internvl_processor",
    "llava_avlm_processor",
    "llava_next_processor",
    "llava_processor",
    "qwen2_5_vl_processor",
    "qwen2_audio_processor",
    "qwen3_vl_processor",
]


def llava_processor(config: Any) -> Any:
    """A ``LlavaProcessor``."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=_clip_images(config),
        tokenizer=_llama_tokenizer(config, {"<image>": config.image_token_index}),
        **_llava_settings(config),
    )


def llava_next_processor(config: Any) -> Any:
    """A ``LlavaNextProcessor``."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side = config.vision_config.image_size
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer=_llama_tokenizer(config, {"<image>": config.image_token_index}),
        **_llava_settings(config),
    )


def llava_avlm_processor(config: Any) -> Any:
    """A ``LlavaAvlmProcessor``."""
    # It registers a processor with transformers, which other models do without.
    from megatron.mimo.models.llava_avlm.processor import LlavaAvlmProcessor

    tokens = {"<image>": config.image_token_index, "<audio>": config.audio_token_index}
    return LlavaAvlmProcessor(
        image_processor=_clip_images(config),
        feature_extractor=_whisper_features(config.audio_config),
        tokenizer=_llama_tokenizer(config, tokens),
        patch_size=config.vision_config.patch_size,
        chat_template=LLAVA_TEMPLATE,
    )


# What Gemma's processor writes around the crops of an image.
_CROPS = "Here is the original image and here are some crops to help you see better"


def gemma3_processor(config: Any) -> Any:
    """A ``Gemma3Processor`` that pans and scans."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    side = config.vision_config.image_size
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    ids = (config.boi_token_index, config.eoi_token_index, config.image_token_index)
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(
            size={"height": side, "width": side},
            do_pan_and_scan=True,
            pan_and_scan_min_crop_size=8,
            pan_and_scan_max_num_crops=2,
            pan_and_scan_min_ratio_to_activate=1.8,
        ),
        tokenizer=_gemma_tokenizer(config, dict(zip(names.values(), ids, strict=True)), names),
        image_seq_length=config.mm_tokens_per_image,
        chat_template=GEMMA_TEMPLATE,
    )


def internvl_processor(config: Any) -> Any:
    """An ``InternVLProcessor``, for images and clips."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = dict(zip(("height", "width"), config.vision_config.image_size, strict=True))
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    image = config.image_token_id
    tokens = dict(zip(names.values(), (image + 1, image + 2, image, image + 3), strict=True))
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=_qwen_tokenizer(config, tokens, names=names),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=config.image_seq_length,
        chat_template=INTERNVL_TEMPLATE,
    )


def qwen2_audio_processor(config: Any) -> Any:
    """A ``Qwen2AudioProcessor``."""
    from transformers import Qwen2AudioProcessor

    audio = config.audio_token_index
    tokens = {"<|audio_bos|>": audio - 1, "<|AUDIO|>": audio, "<|audio_eos|>": audio + 1}
    return Qwen2AudioProcessor(
        feature_extractor=_whisper_features(config.audio_config),
        tokenizer=_qwen_tokenizer(config, tokens),
        chat_template=QWEN_TEMPLATE,
    )


def qwen2_5_vl_processor(config: Any) -> Any:
    """A ``Qwen2_5_VLProcessor``, for images and clips."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = _patch_sizes(config.vision_config)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=_qwen_vl_tokenizer(config),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **sizes),
        chat_template=QWEN_TEMPLATE,
    )


def qwen3_vl_processor(config: Any) -> Any:
    """A ``Qwen3VLProcessor``, for images and clips, whose frames it puts behind their seconds."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = _patch_sizes(config.vision_config)
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=_qwen_vl_tokenizer(config),
        video_processor=Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **sizes),
        chat_template=QWEN_TEMPLATE,
    )


def _patch_sizes(vision: Any) -> dict[str, Any]:
    """Of the processors of images and clips."""
    return {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
    }


def _clip_images(config: Any) -> Any:
    from transformers import CLIPImageProcessor

    side = config.vision_config.image_size
    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def _whisper_features(audio: Any) -> Any:
    """A second of sound, in as many frames as the encoder takes."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=audio.num_mel_bins,
        sampling_rate=TONE_RATE,
        hop_length=TONE_RATE // (2 * audio.max_source_positions),
        chunk_length=1,
        return_attention_mask=True,
    )


def _llava_settings(config: Any) -> dict[str, Any]:
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA_TEMPLATE,
    }


def _llama_tokenizer(config: Any, placeholders: dict[str, int]) -> Any:
    text = config.get_text_config()
    ids = {"<pad>": text.pad_token_id, "<s>": text.bos_token_id, "</s>": text.eos_token_id}
    return tiny_tokenizer(
        {**ids, **placeholders},
        vocab_size=text.vocab_size,
        texts=QUESTIONS,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
    )


def _qwen_vl_tokenizer(config: Any) -> Any:
    return _qwen_tokenizer(
        config,
        {
            "<|vision_start|>": config.vision_start_token_id,
            "<|vision_end|>": config.vision_end_token_id,
            "<|image_pad|>": config.image_token_id,
            "<|video_pad|>": config.video_token_id,
        },
    )


def _gemma_tokenizer(config: Any, placeholders: dict[str, int], names: dict[str, str]) -> Any:
    text = config.get_text_config()
    ids = {"<pad>": text.pad_token_id, "<bos>": text.bos_token_id, "<eos>": text.eos_token_id}
    turns = {"<start_of_turn>": 7, "<end_of_turn>": 8}
    return tiny_tokenizer(
        {**ids, **placeholders, **turns},
        vocab_size=text.vocab_size,
        texts=(*QUESTIONS, _CROPS),
        bos="<bos>",
        eos="<end_of_turn>",
        pad="<pad>",
        names=names,
    )


def _qwen_tokenizer(
    config: Any, placeholders: dict[str, int], *, names: dict[str, str] | None = None
) -> Any:
    text = config.get_text_config()
    ids = {
        "<|endoftext|>": text.pad_token_id,
        "<|im_start|>": text.bos_token_id,
        "<|im_end|>": text.eos_token_id,
    }
    return tiny_tokenizer(
        {**ids, **placeholders},
        vocab_size=text.vocab_size,
        texts=QUESTIONS,
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        names=names,
    )
