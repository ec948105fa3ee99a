"""Distributions of samples, as numbers: what packing and balance are measured on.

Each is a table of quantiles of the text's tokens and of a sample's media (rows and number), written
down to resemble a kind of data set that people train on. They are no measurements of a particular
one: data sets cannot be shipped.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass

from megatron.mimo.data.measure import Measure

__all__ = ["DISTRIBUTIONS", "Distribution"]

_AT = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)  # of all samples, up to the value at this place


@dataclass(frozen=True)
class Distribution:
    """Quantiles of a kind of data set.

    Attributes:
        text: tokens of the text.
        rows: rows of one image.
        images: shares of samples with 0, 1, 2 ... images.
    """

    text: tuple[int, ...]
    rows: tuple[int, ...]
    images: tuple[float, ...]

    def draw(self, generator: random.Random) -> Measure:
        """One sample."""
        at, count = generator.random(), 0
        for share in self.images[:-1]:
            if at < share:
                break
            at, count = at - share, count + 1
        media = tuple(("images", _quantile(self.rows, generator)) for _ in range(count))
        return Measure(_quantile(self.text, generator) + sum(rows for _, rows in media), media)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that there can be."""
        return self.text[-1] + self.rows[-1] * (len(self.images) - 1)


def _quantile(values: tuple[int, ...], generator: random.Random) -> int:
    at = generator.random()
    place = min(bisect_right(_AT, at), len(_AT) - 1)
    share = (at - _AT[place - 1]) / (_AT[place] - _AT[place - 1])
    return round(values[place - 1] + share * (values[place] - values[place - 1]))


DISTRIBUTIONS = {
    # one image of 576 rows, a sentence or two
    "captions": Distribution(
        (12, 16, 22, 28, 38, 55, 110, 240), (576,) * 8, (0.0, 1.0)
    ),
    # instructions in several turns, a tenth of them without an image
    "instructions": Distribution(
        (20, 45, 90, 180, 340, 620, 1250, 2000), (576,) * 8, (0.1, 0.9)
    ),
    # images of any resolution
    "native_resolution": Distribution(
        (15, 30, 60, 120, 260, 520, 1400, 2400), (16, 90, 250, 480, 1000, 1700, 2900, 4096),
        (0.12, 0.7, 0.12, 0.06),
    ),
    # pages with several images between their paragraphs
    "interleaved": Distribution(
        (60, 180, 420, 800, 1300, 1900, 3000, 4000), (64, 64, 144, 256, 256, 256, 256, 256),
        (0.05, 0.3, 0.25, 0.15, 0.1, 0.07, 0.05, 0.03),
    ),
}  # fmt: skip
