"""Image files as RGB, decoded as transformers' ``load_image`` decodes them.

Images that it would make blank, those of more than 8 bits and those that only their transparency
shows, are decoded as a viewer shows them.

Shape legend: H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.backend.hooks import PIXELS
from megatron.mimo.backend.patching import replaced
from megatron.mimo.data.media.source import (
    MediaLimits,
    MediaSource,
    openable,
    require_file,
    require_pixels,
    shown,
    undecodable,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["as_rgb", "load_image", "open_image"]

_ORIENTATION = 274  # of EXIF
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def load_image(path: MediaSource, *, limits: MediaLimits | None = None) -> Image:
    """Read an image of any format that Pillow knows, upright and as RGB.

    Raises:
        InputError: there is no such file, it has too many pixels, or it does not decode.
    """
    limits = limits or MediaLimits()
    require_file(path, "image", limits)
    try:
        with open_image(path, limits) as image:
            return as_rgb(image)
    except InputError as error:
        if shown(path) in str(error):
            raise
        raise InputError(f"image {shown(path)} {error}") from error
    except Exception as error:  # codecs raise nearly every kind, SyntaxError among them
        raise undecodable(path, "an image", error) from error


def open_image(path: MediaSource, limits: MediaLimits) -> Image:
    """Open an image whose size, as its header says, is within the limit."""
    from PIL import Image

    with replaced({PIXELS: lambda _: None}):  # Pillow's own limit; our error has a remedy
        image = Image.open(openable(path))
    try:
        require_pixels(path, *image.size, limits.image_pixels)
    except InputError:
        image.close()
        raise
    return image


def as_rgb(image: Image) -> Image:
    """An image as transformers' ``load_image`` gives it: turned as its EXIF says, RGB.

    Two kinds of image differ from it, which clips values of more than 8 bits and shows the
    colours of transparent pixels: the former are scaled to 8 bits, and the latter laid on a
    background where their colours alone show nothing.

    Raises:
        InputError: grey values of an unknown scale, or not finite.
    """
    from PIL import ImageOps

    image.load()  # Pillow knows the EXIF of some formats only then
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)  # which copies what needs no turning, too
    if image.mode in _DEEP or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _seen(image)
    if image.mode == "RGB" and not getattr(image, "is_animated", False):
        return image  # its pixels are there, whatever becomes of the file
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Scale grey values of 16 or 32 bits to 8 bits, unless they are within 0 to 255 already."""
    from PIL import Image

    values_HW = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values_HW).all():
        raise InputError("has pixels that are not finite; repair the file or drop the conversation")
    least, most = float(values_HW.min()), float(values_HW.max())
    if image.mode == "F" and least >= 0 and most <= 1:
        scale = 255.0
    elif least >= 0 and most <= 255:
        scale = 1.0
    elif least >= 0 and most <= 65535 and image.mode != "F":
        scale = 255 / 65535
    else:
        raise InputError(
            f"has grey values from {least:g} to {most:g}; expected 0 to 1, 0 to 255 or 16 bits: "
            "save it with 8 or 16 bits"
        )
    if scale == 1.0:
        return image.convert("L") if image.mode == "F" else image.convert("RGB")
    return Image.fromarray((values_HW * scale).round().astype(np.uint8))


def _seen(image: Image) -> Image:
    """Drop transparency: the colours, or the image on white or black where they show nothing."""
    from PIL import Image

    bare, with_alpha = image.convert("RGB"), image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema() == (255, 255):
        return bare
    laid = []
    for background in ("white", "black"):
        canvas = Image.new("RGBA", image.size, background)
        laid.append(Image.alpha_composite(canvas, with_alpha).convert("RGB"))
    contrast = _contrast(bare)
    best = next((one for one in laid if _contrast(one) > 4 * contrast), None)
    return bare if best is None else best


def _contrast(image: Image) -> int:
    return max(most - least for least, most in np.reshape(image.getextrema(), (-1, 2)).tolist())
