"""One conversation of InternVL, from Hugging Face's form to a sample.

Images are cut into tiles, the last of which is the whole image made small, and each frame of a clip
is a tile of its own. Tiles without text between them are one item.

Legend: L tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import MediaItem, Sample
from megatron.mimo.models.common.tokens import labels_or, read_tokens, runs_of
from megatron.mimo.models.internvl.vision import ENCODER, rows_per_tile, tile_shape

__all__ = ["sample"]


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids`` and ``pixel_values`` [tiles of all images, C, height, width]."""
    tokens_L, given = read_tokens(features, "pixel_values", name=name)
    rows, runs = rows_per_tile(config), runs_of(tokens_L, config.image_token_id)
    blank = torch.zeros(0, *tile_shape(config.vision_config))
    tiles = given.get("pixel_values", blank)
    if any(length % rows for length in runs) or sum(runs) != rows * len(tiles):
        raise InputError(
            f"sample {name}: runs of {runs} image tokens for {len(tiles)} tiles; expected {rows} "
            "for each tile, and those of an image together: the processor's image_seq_length is "
            "not that of config.json"
        )
    pixels = tiles.float().split([length // rows for length in runs])
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.image_token_id),
        media=tuple(
            MediaItem(
                modality="images",
                encoder=ENCODER,
                inputs={"pixel_values": one},
                rows=length,
            )
            for one, length in zip(pixels, runs, strict=True)
        ),
    )
