"""One conversation of LLaVA, from Hugging Face's form to a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron.mimo.data import Sample
from megatron.mimo.models.common.llava_kind import conversation_images
from megatron.mimo.models.common.tokens import labels_or, read_tokens

__all__ = ["sample"]


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids`` and ``pixel_values`` [images, C, height, width]."""
    tokens_L, given = read_tokens(features, "pixel_values", name=name)
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.image_token_index),
        media=conversation_images(config, given),
    )
