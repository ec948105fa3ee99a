"""What micro-batches of a run hold: by ``--samples``, of the recipe's own data, or full rows."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.micro_batches.batch import Batch
from megatron.mimo.data.micro_batches.counting import collate_and_count
from megatron.mimo.data.sample import MediaItem, Sample
from megatron.mimo.models import family_of
from megatron.mimo.models.common.family import Family
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.training.data import packing_collator

__all__ = ["Typical", "parse_shape", "typical_batches"]

_FORM = re.compile(r"(\d+)(?:\+(\d+)(?:\*(\d+)x(\d+))?)?")
_DRAWN = 16  # samples of a recipe's own data that are looked at
_SIDE = (640, 480)  # of an image whose size a model does not fix
_EXAMPLES = 32  # of a family's examples in which an image is looked for


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of one sample: tokens of text, media, and width and height of each in pixels."""

    text: int
    media: int
    size: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Micro-batches like those of the run.

    Attributes:
        batches: as the collator makes them, on the host.
        text: what they hold, for a person.
    """

    batches: Sequence[Batch]
    text: str


def parse_shape(text: str) -> Shape:
    """``512``, ``512+2`` or ``512+2*640x480``: tokens of text, media, their width and height.

    Raises:
        ConfigError: another form.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--samples {text}: expected TOKENS, TOKENS+IMAGES or TOKENS+IMAGES*WIDTHxHEIGHT, such "
            "as 512+2*640x480"
        )
    words, media, width, height = found.groups()
    size = None if width is None else (int(width), int(height))
    return Shape(text=int(words), media=int(media or 0), size=size)


def typical_batches(recipe: Recipe, args: Namespace, config: Any, shapes: list[Shape]) -> Typical:
    """Micro-batches of a rank.

    Args:
        recipe: the run's.
        args: the run's.
        config: of Hugging Face; None for a model that has none.
        shapes: of samples, which take turns; [] for the recipe's own.

    Raises:
        ConfigError: samples that do not fit, or that this model has not.
    """
    collate = recipe.build_collator(args)
    packed = packing_collator(recipe.name, args, collate) if args.pack else None
    rows = 1 if args.pack else args.micro_batch_size
    if shapes and config is None:
        raise ConfigError(
            f"--samples with recipe {recipe.name!r}, whose model is of no family; leave it away: "
            "the recipe's own data are looked at"
        )
    samples = None if shapes else _own_samples(recipe, args)
    if samples is not None:
        text = f"the first {len(samples)} of the recipe's own"
    elif shapes:
        maker = _Maker(family_of(config), config)
        samples = [maker.sample(shape, args.seq_length) for shape in shapes]
        text = ", ".join(
            _said(shape, sample) for shape, sample in zip(shapes, samples, strict=True)
        )
    else:
        maker = _Maker(family_of(config), config)
        samples = [maker.filling(args.seq_length)]
        text = f"full rows: {_said(None, samples[0])}"
    if packed is not None:
        return Typical(
            batches=[collate_and_count(packed, one) for one in _packed(samples, args)], text=text
        )
    repeated = samples * -(-rows // len(samples)) if len(samples) < rows else samples
    groups = [repeated[at : at + rows] for at in range(0, len(repeated) - rows + 1, rows)]
    return Typical(batches=[collate_and_count(collate, one) for one in groups], text=text)


def _own_samples(recipe: Recipe, args: Namespace) -> list[Sample] | None:
    """The first samples of the data that a recipe makes itself; None where it reads files."""
    if recipe.require is not None:
        try:
            recipe.require(args)
        except ConfigError:
            return None
    if args.train_data_path or args.data_path or getattr(args, "data_mixture", None):
        return None
    train: Any = recipe.build_datasets(args, (_DRAWN, 0, 0)).train
    return [train[number] for number in range(min(_DRAWN, len(train)))]


def _packed(samples: list[Sample], args: Namespace) -> list[list[Sample]]:
    """Rows of samples in turn, as many as fit into each."""
    rows: list[list[Sample]] = []
    number = 0
    while not rows or number < len(samples):
        row, taken = list[Sample](), 0
        while taken + len(samples[number % len(samples)].token_ids) <= args.seq_length:
            row.append(samples[number % len(samples)])
            taken += len(row[-1].token_ids)
            number += 1
        rows.append(row)
    return rows


class _Maker:
    """Makes samples of a family's model, with media like those of its examples."""

    def __init__(self, family: Family, config: Any) -> None:
        self._family, self._config = family, config
        media = family.media(config)
        self._placeholders = dict(media.special_token_ids)
        self._mrope = media.mrope
        vocabulary = range(config.get_text_config().vocab_size)
        taken = set(self._placeholders.values())
        self._word = next(token for token in vocabulary if token not in taken)
        self._item = self._example()

    def filling(self, length: int) -> Sample:
        """A sample of this length, with one medium where one fits."""
        item = self._sized(None)
        media = (item,) if item.rows < length else ()
        return self._made(length - sum(one.rows for one in media), media, length)

    def sample(self, shape: Shape, length: int) -> Sample:
        """A sample of a shape, for rows of ``length`` tokens."""
        return self._made(shape.text, (self._sized(shape.size),) * shape.media, length)

    def _made(self, words: int, media: tuple[MediaItem, ...], length: int) -> Sample:
        ids = [self._placeholders[item.modality] for item in media for _ in range(item.rows)]
        tokens = torch.tensor([*ids, *[self._word] * words], dtype=torch.int64)
        if len(tokens) > length:
            raise ConfigError(
                f"--samples: {words} tokens of text and {len(ids)} rows of {len(media)} media are "
                f"{len(tokens)}, more than --seq-length {length}; give smaller ones, or a larger "
                "--seq-length"
            )
        positions = torch.arange(len(tokens))
        return Sample(
            name="typical",
            token_ids=tokens,
            is_label=torch.arange(len(tokens)) >= len(ids),
            media=media,
            position_ids=positions.expand(3, -1) if self._mrope else None,
        )

    def _example(self) -> MediaItem:
        """The largest item of the first modality among the family's examples."""
        generator = torch.Generator().manual_seed(1)
        items: list[MediaItem] = []
        for _ in range(_EXAMPLES):
            made = self._family.example(self._config, generator)
            items += self._family.sample(self._config, made).media
            if items and "grid" not in items[0].inputs:
                break  # full-sized ones take their time
        return max(items, key=lambda item: (item.modality == items[0].modality, item.rows))

    def _sized(self, size: tuple[int, int] | None) -> MediaItem:
        """The example with so many pixels, in a model whose images have any size."""
        vision: Any = getattr(self._config, "vision_config", None)
        if "grid" not in self._item.inputs:
            if size is not None:
                raise ConfigError(
                    f"--samples: {self._family.name} takes media of its own size; leave *"
                    f"{size[0]}x{size[1]} away"
                )
            return self._item
        width, height = size or _SIDE
        merge, values = vision.spatial_merge_size, self._item.inputs["pixel_values"].size(-1)
        side = vision.patch_size * merge
        down, across = (max(round(pixels / side), 1) for pixels in (height, width))
        patches = down * across * merge**2
        inputs = {
            "pixel_values": torch.zeros(1, 1).expand(patches, values),
            "grid": torch.tensor([1, down * merge, across * merge]),
        }
        return replace(self._item, inputs={**self._item.inputs, **inputs}, rows=down * across)


def _said(shape: Shape | None, sample: Sample) -> str:
    media = ", ".join(f"{item.rows} rows of {item.modality}" for item in sample.media[:1])
    count = len(sample.media)
    size = "" if shape is None or shape.size is None else f" ({shape.size[0]}x{shape.size[1]})"
    text = f"{len(sample.token_ids)} tokens"
    return f"{text}, {count} x {media}{size}" if count else text
