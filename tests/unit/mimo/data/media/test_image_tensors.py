from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data import decode_image

COLOR_HWC = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def test_bytes_path_and_array_agree(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(COLOR_HWC))
    expected = torch.tensor(COLOR_HWC).permute(2, 0, 1) / 255
    for source in (png(COLOR_HWC), path, str(path), COLOR_HWC):
        pixels = decode_image(source)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, expected)


def test_grey() -> None:
    grey = COLOR_HWC[..., 0].copy()
    assert torch.equal(decode_image(grey, channels=1), torch.tensor(grey)[None] / 255)
    assert decode_image(grey, channels=3).shape == (3, 5, 7)
    assert decode_image(COLOR_HWC, channels=1).shape == (1, 5, 7)


@pytest.mark.parametrize(
    "source",
    [b"", b"not an image", png(COLOR_HWC)[:40], np.zeros((2, 2), np.float32)],
    ids=["empty", "garbage", "truncated", "float array"],
)
def test_what_does_not_decode_is_named(source: bytes | np.ndarray) -> None:
    with pytest.raises(InputError, match="digits/train/17 does not decode as an image"):
        decode_image(source, name="digits/train/17")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png does not decode .*No such file"):
        decode_image(tmp_path / "nowhere.png")


def test_unknown_channels() -> None:
    with pytest.raises(InputError, match="channels is 2"):
        decode_image(COLOR_HWC, channels=2)
