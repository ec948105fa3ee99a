"""The size of an image as it is displayed, read from the file's header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.mimo.data.media.source import EncodedMedium, MediaLimits, openable, require_file

__all__ = ["Size", "image_size"]

Size = tuple[int, int]
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # of EXIF: values that exchange width and height


def image_size(value: Any, limits: MediaLimits) -> Size | None:
    """Width and height of an image as it is displayed, turned as its EXIF says.

    Args:
        value: of a part of a conversation.
        limits: of images.

    Returns:
        None for animations, images above the limit of pixels, and values that are neither an image
        file nor a Pillow image.

    Raises:
        InputError: the file does not exist, or is no regular file.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.size
    if not isinstance(value, Path | EncodedMedium):
        return None
    require_file(value, "image", limits)
    source = openable(value)
    with Image.open(source) as image:
        width, height = image.size
        if width * height > limits.image_pixels or getattr(image, "n_frames", 1) > 1:
            return None
        # Pillow decodes a PNG to look for what stands behind its pixels, which is rare
        has_exif = image.format != "PNG" or {"exif", "Raw profile type exif"} & set(image.info)
        if has_exif and image.getexif().get(_ORIENTATION) in _TURNED:
            return height, width
        return width, height
