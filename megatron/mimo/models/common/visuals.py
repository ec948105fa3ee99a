"""Images and clips of the Qwen-VL models: from a conversation's joined patches to media items.

Both go through one encoder, in the order of their placeholders, as one modality.

Legend: L tokens of a conversation, T patches, E values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from megatron.mimo.data import MediaFormat, MediaItem
from megatron.mimo.data.chat.conversation_model import Media
from megatron.mimo.encoders.patch_grids import Grid, SquareGeometry
from megatron.mimo.models.common.config_fields import ModelFields, Rules, field_rules, parts_of
from megatron.mimo.models.common.language import language_arguments, text_config

__all__ = [
    "IMAGE",
    "VIDEO",
    "Visual",
    "check_patches",
    "patch_shape",
    "patch_values",
    "random_features",
    "token_types",
    "visual_fields",
    "visual_item",
    "visual_language",
    "visual_media",
    "visual_placeholders",
    "visuals_in_order",
]

IMAGE, VIDEO = 1, 2  # as in mm_token_type_ids, where 0 is text
_NAMES = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Visual:
    """One image or clip of a conversation.

    Attributes:
        kind: ``IMAGE`` or ``VIDEO``.
        number: among those of its kind.
        pixels_TE: its patches.
        grid: of patches.
        squares: frames, lines and columns of rows.
        rows: that it yields.
    """

    kind: int
    number: int
    pixels_TE: Tensor
    grid: Grid
    squares: Grid
    rows: int


def visual_fields(name: str, vision: Rules) -> ModelFields:
    """What a family takes of its configuration.

    Args:
        name: of the family, with which its parts' ``model_type`` begins.
        vision: what becomes of the fields of its vision encoder's configuration.
    """
    return ModelFields(
        rules=field_rules(
            "text_config vision_config image_token_id video_token_id tie_word_embeddings",
            aside="vision_start_token_id vision_end_token_id",
        ),
        parts={
            "text_config": parts_of(f"{name}_text"),
            "vision_config": {f"{name}_vision": vision},
        },
    )


def visual_placeholders(config: Any) -> dict[str, int]:
    """The placeholder token of each kind of medium in Hugging Face's conversations."""
    return {"images": config.image_token_id, "videos": config.video_token_id}


def visual_language(config: Any) -> dict[str, object]:
    """Megatron's arguments of the language model.

    Raises:
        ConfigError: the encoder's rows are not as wide as the language model's.
    """
    text, given = text_config(config), config.vision_config.out_hidden_size
    if given != text.hidden_size:
        raise ConfigError(
            f"vision_config.out_hidden_size is {given}; expected {text.hidden_size}, the language "
            "model's hidden size"
        )
    # The fused rotation takes no packed sequences, nor several samples with positions in 3 axes.
    return {**language_arguments(text), "apply_rope_fusion": False}


def visual_media(config: Any, encoder: str, **given: Any) -> Media:
    """Placeholders and formats of its media: one item is one image or clip.

    Args:
        config: of the whole model.
        encoder: what it is called.
        given: further fields of ``Media``.
    """
    values = patch_values(config.vision_config)
    return Media(
        special_token_ids={"images": config.image_token_id},
        formats={
            "images": MediaFormat(
                encoder=encoder,
                inputs={
                    "pixel_values": (torch.float32, (None, values)),
                    "grid": (torch.int64, (3,)),
                },
                on_host=("grid",),
            )
        },
        mrope=True,
        **given,
    )


def check_patches(vision: Any, *, activation: str) -> float:
    """The base of the rotation of a vision configuration that our encoders can follow.

    Raises:
        UnsupportedError: a setting that they do not have.
    """
    if vision.hidden_act != activation:
        raise UnsupportedError(
            f"vision_config.hidden_act is {vision.hidden_act!r}; expected {activation!r}"
        )
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise UnsupportedError(
                f"vision_config.{name} is {getattr(vision, name)!r}; expected one number"
            )
    rope = vision.rope_parameters or {"rope_type": "axial", "rope_theta": 10_000.0}
    if rope["rope_type"] != "axial":
        raise UnsupportedError(
            f"vision_config's rope_type is {rope['rope_type']!r}; expected 'axial'"
        )
    return float(rope["rope_theta"])


def patch_shape(vision: Any) -> tuple[int, int, int, int]:
    """Channels, frames, height and width of a patch."""
    size = vision.patch_size
    return (vision.in_channels, vision.temporal_patch_size, size, size)


def patch_values(vision: Any) -> int:
    """Values of a patch."""
    return math.prod(patch_shape(vision))


def token_types(config: Any, tokens_L: Tensor, given_1L: Tensor | None, name: str) -> Tensor:
    """The kind of each token: ``IMAGE``, ``VIDEO`` or 0.

    Args:
        config: of the whole model.
        tokens_L: of the conversation.
        given_1L: ``mm_token_type_ids``, which have to be the same; None where there are none.
        name: of the sample, for errors.
    """
    types_L = IMAGE * (tokens_L == config.image_token_id).long()
    types_L += VIDEO * (tokens_L == config.video_token_id).long()
    if given_1L is not None and not torch.equal(given_1L.flatten().long(), types_L):
        raise InputError(
            f"sample {name}: mm_token_type_ids are not those of input_ids; expected 1 at tokens "
            "that are image_token_id, 2 at video_token_id, 0 elsewhere"
        )
    return types_L


def visual_item(visual: Visual, encoder: str) -> MediaItem:
    """The item of a sample."""
    return MediaItem(
        modality="images",
        encoder=encoder,
        inputs={"pixel_values": visual.pixels_TE.float(), "grid": torch.tensor(visual.grid)},
        rows=visual.rows,
    )


def visuals_in_order(
    types_L: Tensor, given: Mapping[str, Tensor], geometry: SquareGeometry
) -> list[Visual]:
    """Images and clips in the order of their placeholders.

    Args:
        types_L: see :func:`token_types`.
        given: ``pixel_values`` with ``image_grid_thw``, and the same of videos, where there are.
        geometry: of the encoder.

    Raises:
        InputError: placeholders and media that do not fit each other.
    """
    waiting = {
        IMAGE: _visuals(given, "pixel_values", "image_grid_thw", IMAGE, geometry),
        VIDEO: _visuals(given, "pixel_values_videos", "video_grid_thw", VIDEO, geometry),
    }
    placeholders = types_L[types_L > 0].tolist()
    visuals: list[Visual] = []
    at = 0
    while at < len(placeholders):
        kind = placeholders[at]
        one, name = next(waiting[kind], None), _NAMES[kind]
        if one is None:
            raise InputError(
                f"{placeholders[at:].count(kind)} {name} tokens are left and no {name} for them; "
                f"expected one row of {name}_grid_thw for each {name}"
            )
        found = placeholders[at : at + one.rows].count(kind)
        if found != one.rows:
            raise InputError(
                f"the {name} of grid {one.grid} needs {one.rows} {name} tokens in a row and finds "
                f"{found}"
            )
        visuals.append(one)
        at += one.rows
    for kind, rest in waiting.items():
        left = len(list(rest))
        if left:
            raise InputError(
                f"the last {left} of its {_NAMES[kind]}s have no {_NAMES[kind]} tokens; expected "
                f"one token for each {geometry.merge**2} patches"
            )
    return visuals


def _visuals(
    given: Mapping[str, Tensor], pixels: str, grids: str, kind: int, geometry: SquareGeometry
) -> Iterator[Visual]:
    """Images, or clips, from their joined patches ``given[pixels]`` and ``given[grids]``."""
    if (pixels in given) != (grids in given):
        raise InputError(f"one of {pixels} and {grids} is missing; expected both or none")
    if pixels not in given:
        return
    at, patches_TE = 0, given[pixels]
    counts = [int(count) for count in given[grids].prod(dim=1)]
    if len(patches_TE) != sum(counts):
        raise InputError(
            f"{pixels} has {len(patches_TE)} patches for {grids} {given[grids].tolist()}; expected "
            f"{sum(counts)}"
        )
    for number, (sizes, count) in enumerate(zip(given[grids].tolist(), counts, strict=True)):
        frames, lines, columns = sizes
        grid = (frames, lines, columns)
        rows = geometry.rows(grid)
        yield Visual(
            kind=kind,
            number=number,
            pixels_TE=patches_TE[at : at + count],
            grid=grid,
            squares=(frames, lines // geometry.merge, columns // geometry.merge),
            rows=rows,
        )
        at += count


def random_features(
    config: Any, tokens_L: Tensor, grids: Sequence[list[list[int]]], generator: Generator
) -> dict[str, Tensor]:
    """A conversation in the form that the model of transformers takes, with random patches.

    Args:
        config: the model's.
        tokens_L: its tokens, placeholders included.
        grids: patches of the images, then of the clips: frames, down, across.
        generator: of the patches.
    """
    tokens_1L = tokens_L[None]
    features = {
        "input_ids": tokens_1L,
        "mm_token_type_ids": (tokens_1L == config.image_token_id).int()
        + 2 * (tokens_1L == config.video_token_id).int(),
    }
    names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    values = patch_values(config.vision_config)
    for (pixels, grid), sizes in zip(names, grids, strict=True):
        if sizes:
            features[grid] = torch.tensor(sizes)
            patches = int(features[grid].prod(dim=1).sum())
            features[pixels] = torch.randn(patches, values, generator=generator)
    return features
