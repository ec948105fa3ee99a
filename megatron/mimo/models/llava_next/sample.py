"""One conversation of LLaVA-NeXT, from Hugging Face's form to a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import MediaItem, Sample
from megatron.mimo.models.common.tokens import labels_or, read_tokens
from megatron.mimo.models.common.vision_tower import tower_name
from megatron.mimo.models.llava_next.tiles import Size, row_sources, tiles_of

__all__ = ["sample"]


def sample(
    config: Any,
    features: Mapping[str, Tensor],
    *,
    is_label: Tensor | None = None,
    name: str = "sample",
) -> Sample:
    """Translate ``input_ids``, ``pixel_values`` and ``image_sizes``.

    ``pixel_values`` are [images, tiles, C, height, width], with unused tiles behind those of an
    image, or [tiles of all images, C, height, width]; ``image_sizes`` [images, 2] are heights and
    widths.
    """
    tokens_L, given = read_tokens(features, "pixel_values", "image_sizes", name=name)
    if ("pixel_values" in given) != ("image_sizes" in given):
        raise InputError(f"sample {name}: expected pixel_values and image_sizes, or neither")
    sizes: list[Size] = [(size[0], size[1]) for size in _numbers(given.get("image_sizes"))]
    counts = [rows * columns + 1 for rows, columns in (tiles_of(config, size) for size in sizes)]
    items = tuple(
        MediaItem(
            modality="images",
            encoder=tower_name(config.vision_config),
            inputs={"pixel_values": tiles.float(), "row_sources": sources},
            rows=len(sources),
        )
        for tiles, sources in zip(
            _tiles(given.get("pixel_values"), counts, name),
            (row_sources(config, size) for size in sizes),
            strict=True,
        )
    )
    return Sample(
        name=name,
        token_ids=tokens_L,
        is_label=labels_or(is_label, tokens_L, config.image_token_index),
        media=items,
    )


def _numbers(sizes: Tensor | None) -> list[list[int]]:
    return [] if sizes is None else sizes.tolist()


def _tiles(pixel_values: Tensor | None, counts: Sequence[int], name: str) -> Sequence[Tensor]:
    """The tiles of each image."""
    if pixel_values is None:
        return ()
    if pixel_values.dim() == 5 and len(pixel_values) == len(counts):
        tiles = [image[:count] for image, count in zip(pixel_values, counts, strict=True)]
        if [len(image) for image in tiles] == list(counts):
            return tiles
    if pixel_values.dim() == 4 and len(pixel_values) == sum(counts):
        return pixel_values.split(list(counts))
    raise InputError(
        f"sample {name}: pixel_values are {list(pixel_values.shape)}, and image_sizes ask for "
        f"{list(counts)} tiles; were they made with another image_grid_pinpoints?"
    )
