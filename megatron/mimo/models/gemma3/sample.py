"""One conversation of Gemma 3, from Hugging Face's form to a sample.

Legend: L tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import Sample
from megatron.mimo.models.common.tokens import labels_or, read_tokens, runs_of
from megatron.mimo.models.common.vision_tower import image_items, tower_name

__all__ = ["sample"]


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids``, ``pixel_values`` [images, C, height, width], ``token_type_ids``.

    An item is an image, or a crop of one: pan-and-scan makes several, each with its own tokens.
    ``token_type_ids`` have to be 1 at the tokens of images: transformers reads from them which
    tokens see each other, and without them none do.
    """
    tokens_L, given = read_tokens(features, "pixel_values", "token_type_ids", name=name)
    is_image_L = tokens_L == config.image_token_index
    types_1L = given.get("token_type_ids")
    if types_1L is None and not bool(is_image_L.any()):
        types_1L = torch.zeros_like(tokens_L)
    if types_1L is None or not torch.equal(types_1L.flatten() == 1, is_image_L):
        raise InputError(
            f"sample {name}: token_type_ids are {'missing' if types_1L is None else 'others'}; "
            "expected 1 at tokens that are image_token_index, 0 elsewhere, as the processor gives "
            "them with return_mm_token_type_ids"
        )
    rows, runs = config.mm_tokens_per_image, runs_of(tokens_L, config.image_token_index)
    pixels: Any = given.get("pixel_values", ())
    if runs != [rows] * len(pixels):
        raise InputError(
            f"sample {name}: runs of {runs} image tokens for {len(pixels)} images; expected one of "
            f"{rows} for each: the processor's image_seq_length is not mm_tokens_per_image"
        )
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.image_token_index),
        media=image_items(pixels, encoder=tower_name(config.vision_config), rows=rows),
    )
