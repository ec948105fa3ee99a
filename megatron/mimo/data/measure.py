"""How large a sample is: what global batches are planned by."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.sample import Sample

__all__ = ["Measure", "check_measure", "measure_of"]


@dataclass(frozen=True)
class Measure:
    """What is known of a sample before it is decoded.

    Attributes:
        length: tokens, placeholders included.
        media: modality and rows of each medium.
    """

    length: int
    media: tuple[tuple[str, int], ...] = ()


def measure_of(sample: Sample) -> Measure:
    """The measure of a sample that has been read."""
    return Measure(
        len(sample.token_ids), tuple((item.modality, item.rows) for item in sample.media)
    )


def check_measure(sample: Sample, expected: Measure) -> None:
    """Refuse a sample that is not as long as it was measured to be.

    Raises:
        InputError: the lengths differ.
    """
    found = len(sample.token_ids)
    if found != expected.length:
        raise InputError(
            f"{sample.name}: {found} tokens, and it was measured as {expected.length}; its files "
            "have changed, or the processor looks at more than an image's size: give "
            "--measure-by-reading"
        )
