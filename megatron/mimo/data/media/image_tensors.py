"""Images as float tensors, from files, bytes or raw pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.image_files import as_rgb

_MODES = {1: "L", 3: "RGB"}


def decode_image(
    source: bytes | str | Path | np.ndarray, *, channels: int = 3, name: str | None = None
) -> Tensor:
    """Turn an encoded or raw image into pixels.

    Args:
        source: an encoded image (its bytes, or the path of a file; any format Pillow reads), or
            raw uint8 pixels [H, W] or [H, W, 3].
        channels: 1 for grey, 3 for red-green-blue; the image is converted.
        name: what an error calls the image; default: the path, or "image".

    Returns:
        float32 [channels, H, W], each value in 0..1.

    Raises:
        InputError: the source does not decode; the message names it.
    """
    # Pillow is imported here because reading a data set's samples must not need it otherwise.
    from PIL import Image

    if channels not in _MODES:
        raise InputError(f"channels is {channels}; expected 1 (grey) or 3 (red-green-blue)")
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8:
                raise TypeError(f"raw pixels have dtype {source.dtype}, expected uint8")
            image = Image.fromarray(source)
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        pixels_HWC = np.array(as_rgb(image).convert(_MODES[channels]), dtype=np.float32) / 255.0
    except Exception as error:  # codecs raise nearly every kind, SyntaxError among them
        raise InputError(
            f"{name} does not decode as an image: {error}; replace the file or drop the sample"
        ) from error
    return torch.from_numpy(pixels_HWC.reshape(*pixels_HWC.shape[:2], channels)).movedim(-1, 0)
