"""Media in small: pictures, frames side by side, the loudness of a recording over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.mimo.data.media.files import Video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Thumbnail", "thumbnail"]

_FRAMES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Thumbnail:
    """A medium in small.

    Attributes:
        kind: "image", "video" or "audio".
        name: of its file.
        size: what it is, in words.
        image: RGB.
    """

    kind: str
    name: str
    size: str
    image: Image


def thumbnail(kind: str, name: str, medium: Any, *, side: int, rate: int) -> Thumbnail:
    """A medium as the processor takes it, in small.

    Args:
        kind: of the medium.
        name: of its file.
        medium: a Pillow image, float32 [L], or a ``Video``.
        side: pixels of the longer side.
        rate: samples per second of recordings.
    """
    from PIL import Image

    if isinstance(medium, Video):
        count, height, width, _ = medium.frames_THWC.shape
        picked = np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(int)
        strip = np.concatenate([medium.frames_THWC[number] for number in picked], axis=1)
        image = Image.fromarray(strip)
        size = f"{count} frames at {medium.fps:g} per second, {width} x {height}"
    elif kind == "audio":
        image = _loudness(np.asarray(medium), side)
        size = f"{len(medium) / rate:.2f} s at {rate} Hz" if rate else f"{len(medium)} samples"
    else:
        image = medium if isinstance(medium, Image.Image) else Image.fromarray(np.asarray(medium))
        size = f"{image.width} x {image.height}"
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return Thumbnail(kind=kind, name=name, size=size, image=image)


def _loudness(samples_L: np.ndarray, side: int) -> Image:
    """The largest sample in each slice of time, as a column around the middle."""
    from PIL import Image

    height = max(side // 4, 8)
    columns = np.array_split(np.abs(samples_L), min(side, len(samples_L)))
    peaks = np.array([column.max() for column in columns])
    heights = np.maximum(peaks / max(float(peaks.max()), 1e-9) * height / 2, 0.5)
    distance = np.abs(np.arange(height) - (height - 1) / 2)[:, None]
    pixels_HW = np.where(distance <= heights[None], 60, 240).astype(np.uint8)
    return Image.fromarray(pixels_HW)
