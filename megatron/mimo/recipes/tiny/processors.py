"""Processors for the tiny configurations of the families, made without any file."""

from __future__ import annotations

from typing import Any

from megatron.mimo.recipes.tiny.tasks import QUESTIONS
from megatron.mimo.recipes.tiny.tokenizer import LLAVA_TEMPLATE, tiny_tokenizer

__all__ = ["llava_processor"]


def llava_processor(config: Any) -> Any:
    """A ``LlavaProcessor``."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    vision = config.vision_config
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**_square(vision.image_size)),
        tokenizer=_llama_tokenizer(config, {"<image>": config.image_token_index}),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


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


def _square(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
