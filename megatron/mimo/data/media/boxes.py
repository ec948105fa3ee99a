"""Boxes in the units that a model has learned them in.

Data give a box in pixels of the image as it lies on disk, or as shares of its width and height.
Models read and write boxes in pixels of the image as their processor resizes it, or in thousandths
of its sides: which, a family says by ``box_units``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.image_sizes import Size, image_size
from megatron.mimo.data.media.source import MediaLimits, shown

__all__ = ["BOX_TYPES", "BoxWriter"]

BOX_TYPES = {"real": None, "norm1": (1, 1), "norm1000": (1000, 1000)}
"""``bbox_type`` of ms-swift -> the units of an image's sides; None for its pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxWriter:
    """Writes boxes as a model reads them.

    Attributes:
        units: from the size of an image in pixels to its width and height in the model's units;
            None where the model has no such convention.
        family: whose, for errors.
        limits: of images.
    """

    units: Callable[[Size], Size] | None
    family: str
    limits: MediaLimits = field(default_factory=MediaLimits)

    def __call__(self, numbers: Sequence[float], kind: str, image: Any, name: str) -> list[float]:
        """A box, or a point, in the model's units.

        Args:
            numbers: x and y in turn.
            kind: a key of ``BOX_TYPES``.
            image: the one that the box is in, as a record names it.
            name: of the record, for errors.

        Raises:
            InputError: no convention, no image, or a box that is not within it.
        """
        if self.units is None:
            raise InputError(
                f"{name}: has boxes, and in which units models of the family {self.family!r} read "
                "them is not known here; write them in these units and give --boxes as-is"
            )
        try:
            size = image_size(image, self.limits)
        except OSError as error:
            raise InputError(f"{name}: {shown(image)} is no image: {error}; replace it") from error
        if size is None:
            raise InputError(
                f"{name}: has boxes in {shown(image)}, whose size its header does not tell; give "
                "an image of one frame within --max-image-pixels"
            )
        sides, target = BOX_TYPES[kind] or size, self.units(size)
        ends = [sides[place % 2] for place in range(len(numbers))]
        if not all(0 <= one <= end for one, end in zip(numbers, ends, strict=True)):
            raise InputError(
                f"{name}: the box {list(numbers)} is not within {sides[0]} x {sides[1]}, the "
                f"{'pixels' if kind == 'real' else 'units of ' + kind} of {shown(image)}"
            )
        return [
            round(one / end * target[place % 2])
            for place, (one, end) in enumerate(zip(numbers, ends, strict=True))
        ]
