"""LLaVA-NeXT: LLaVA for images of any resolution, seen as a whole and in tiles."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.mimo.convert.keys import KeyTable, Row
from megatron.mimo.data import MediaFormat, MediaItem, Sample
from megatron.mimo.encoders import NEWLINE, AnyResolutionSubmodules, NewlineProjection
from megatron.mimo.models.family import Family, Media
from megatron.mimo.models.language import language_spec
from megatron.mimo.models.llava import (
    TINY_TEXT,
    TINY_VISION,
    example_tokens,
    key_table,
    labels_or,
    projector_spec,
    read_tokens,
    tower_of,
)
from megatron.mimo.models.llava import (
    arguments as llava_arguments,
)
from megatron.mimo.models.llava_parts import LLAVA_NEXT
from megatron.mimo.models.vision_tower import image_shape, rows_per_image, tower_name
from megatron.mimo.recipes.recipe import Stage

__all__ = ["FAMILY", "best_resolution", "row_sources", "tiles_of"]

Size = tuple[int, int]  # height, width


def arguments(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model."""
    _check_resolutions(config)
    return llava_arguments(config)


def build(config: Any, args: Namespace, stage: Stage) -> MimoModelConfig:
    """The model for one stage."""
    _side_in_patches(config)
    spec = language_spec(args, stage)
    language = spec.params["config"]
    projection = ModuleSpec(
        module=NewlineProjection,
        params={"config": language, "projector": projector_spec(config, language, stage)},
    )
    images = ModuleSpec(
        module=AnyResolutionSubmodules,
        submodules={
            "encoders": {tower_name(config.vision_config): tower_of(config, language, stage)},
            "input_projections": [projection],
        },
    )
    return MimoModelConfig(
        language_model_spec=spec,
        modality_submodules_spec={"images": images},
        special_token_ids={"images": config.image_token_index},
    )


def keys(config: Any) -> KeyTable:
    """LLaVA's parameter names and the newline's."""
    newline = Row(
        mimo="modality_submodules.images.input_projections.0.newline", hf=("image_newline",)
    )
    return key_table(config, projector="projector.", more=(newline,))


def media(config: Any) -> Media:
    """One item is one image: its tiles, the first of which is the whole image made small."""
    vision = config.vision_config
    inputs = {
        "pixel_values": (torch.float32, (None, *image_shape(vision))),
        "row_sources": (torch.int64, (None,)),
    }
    return Media(
        special_token_ids={"images": config.image_token_index},
        formats={"images": MediaFormat(encoder=tower_name(vision), inputs=inputs)},
    )


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The resolution in which most of an image's pixels survive; of equal ones the smallest.

    Args:
        size: of the image.
        resolutions: height and width of each; the first of equally good ones is taken.
    """
    height, width = size

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -resolution[0] * resolution[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def tiles_of(config: Any, size: Size) -> Size:
    """Rows and columns of the tiles of an image, the one of the whole image left out."""
    side: int = config.vision_config.image_size
    height, width = best_resolution(size, config.image_grid_pinpoints)
    return height // side, width // side


def row_sources(config: Any, size: Size) -> Tensor:
    """int64 [rows]: where each row of an image comes from, see ``AnyResolutionSubmodules``.

    First all rows of the first tile. Then line by line those of the others, without what they
    have above and below, or left and right, of the image; a newline ends each line.

    Args:
        config: of the model.
        size: of the image before it was cut.
    """
    side = _side_in_patches(config)
    tile_rows, tile_columns = tiles_of(config, size)
    first, last, left, right = _without_padding(size, (tile_rows * side, tile_columns * side))
    y, x = torch.arange(first, last)[:, None], torch.arange(left, right)[None]
    tile = 1 + y // side * tile_columns + x // side
    lines = tile * side**2 + y % side * side + x % side
    newlines = torch.full((last - first, 1), NEWLINE)
    return torch.cat([torch.arange(side**2), torch.cat([lines, newlines], dim=1).flatten()])


def _without_padding(size: Size, grid: Size) -> tuple[int, int, int, int]:
    """Lines from and to, columns from and to, that an image fills of a grid it is centred in."""
    (height, width), (grid_height, grid_width) = size, grid
    if width / height > grid_width / grid_height:
        filled = int(round(height * (grid_width / width), 7))
        border = (grid_height - filled) // 2
        return border, grid_height - border, 0, grid_width
    filled = int(round(width * (grid_height / height), 7))
    border = (grid_width - filled) // 2
    return 0, grid_height, border, grid_width - border


def _side_in_patches(config: Any) -> int:
    """Patches along the side of a tile, all of which give a row."""
    vision = config.vision_config
    side: int = vision.image_size // vision.patch_size
    rows = rows_per_image(vision, strategy=config.vision_feature_select_strategy)
    if rows != side**2:
        raise UnsupportedError(
            f"a tile of {side} x {side} patches gives {rows} rows; expected one per patch: "
            "vision_feature_select_strategy 'default' with CLIP, 'full' with SigLIP"
        )
    return side


def _check_resolutions(config: Any) -> None:
    """Refuse resolutions that are no whole tiles, which transformers cuts and cannot use."""
    side = config.vision_config.image_size
    for resolution in config.image_grid_pinpoints:
        if len(resolution) != 2 or any(length < 1 or length % side for length in resolution):
            raise UnsupportedError(
                f"config.json: image_grid_pinpoints has {list(resolution)}; expected height and "
                f"width that are multiples of vision_config.image_size, {side}"
            )


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


def tiny() -> Any:
    """CLIP as in LLaVA's, for up to 2 x 2 tiles, and Mistral with 2 layers."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TINY_VISION),
        text_config=MistralConfig(**TINY_TEXT, sliding_window=None),
        image_token_index=4,
        image_seq_length=9,
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24]],
        architectures=["LlavaNextForConditionalGeneration"],
    )


def example(config: Any, generator: Generator) -> dict[str, Tensor]:
    """One to three images of different sizes with text before, between and behind them."""
    count = int(torch.randint(1, 4, (), generator=generator))
    side = config.vision_config.image_size
    sizes_N2 = torch.randint(side // 3, 3 * side, (count, 2), generator=generator)
    sizes: list[Size] = [(size[0], size[1]) for size in sizes_N2.tolist()]
    tiles = [rows * columns + 1 for rows, columns in (tiles_of(config, size) for size in sizes)]
    shape = (count, max(tiles), *image_shape(config.vision_config))
    rows = [len(row_sources(config, size)) for size in sizes]
    return {
        "input_ids": example_tokens(config, rows, generator),
        "pixel_values": torch.randn(*shape, generator=generator),
        "image_sizes": sizes_N2,
    }


FAMILY = Family(
    name="llava_next",
    arguments=arguments,
    build=build,
    keys=keys,
    media=media,
    sample=sample,
    tiny=tiny,
    example=example,
    assembly=LLAVA_NEXT,
)
