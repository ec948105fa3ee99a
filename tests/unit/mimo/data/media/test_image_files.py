"""Pictures are transformers' own; what those would empty is as a person sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as theirs

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import MediaLimits, load_image
from megatron.mimo.data.media.image_tensors import decode_image

HALVES = np.zeros((20, 40, 3), np.uint8)
HALVES[:, :20, 0] = HALVES[:, 20:, 2] = 255
LEFT_TO_RIGHT = np.linspace(0, 1, 16)[None].repeat(4, axis=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(HALVES).save(path, exif=exif)
    expected = np.asarray(theirs(str(path)))
    assert np.array_equal(np.asarray(load_image(path)), expected)
    assert (decode_image(path) * 255).permute(1, 2, 0).numpy().astype(np.uint8).tolist() == (
        expected.tolist()
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_ordinary_pictures_are_those_of_transformers(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(HALVES).convert(mode).save(path)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(theirs(str(path))))


def test_deep_pictures_keep_their_shades(tmp_path: Path) -> None:
    expected = (LEFT_TO_RIGHT * 255).round()
    for name, values in (
        ("deep.png", (LEFT_TO_RIGHT * 65535).round().astype(np.uint16)),
        ("long.tif", (LEFT_TO_RIGHT * 65535).round().astype(np.int32)),
        ("float.tif", LEFT_TO_RIGHT.astype(np.float32)),
        ("plain.tif", expected.astype(np.int32)),
        ("float255.tif", expected.astype(np.float32)),
    ):
        Image.fromarray(values).save(tmp_path / name)
        read = np.asarray(load_image(tmp_path / name))[..., 0]
        assert np.abs(read - expected).max() <= 1, name
    for name, values, message in (
        ("far.tif", LEFT_TO_RIGHT.astype(np.float32) * 1e4, "grey values from 0 to 10000"),
        ("below.tif", -LEFT_TO_RIGHT.astype(np.float32), "grey values from -1 to -?0"),
        ("nan.tif", np.full((4, 16), np.nan, np.float32), "pixels that are not finite"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name} has {message}"):
            load_image(tmp_path / name)


def test_transparency_hides_and_shows(tmp_path: Path) -> None:
    drawn = np.zeros((8, 8, 4), np.uint8)  # black on nothing
    drawn[2:6, 2:6, 3] = 255
    white = drawn.copy()
    white[..., :3] = 255  # white on nothing
    logo = drawn.copy()
    logo[2:6, 2:6, 0] = 200  # red on nothing: transformers' reading shows it
    for name, pixels, inside, outside in (
        ("black", drawn, (0, 0, 0), (255, 255, 255)),
        ("white", white, (255, 255, 255), (0, 0, 0)),
        ("red", logo, (200, 0, 0), (0, 0, 0)),
    ):
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        image = load_image(path)
        assert (image.getpixel((3, 3)), image.getpixel((0, 0))) == (inside, outside), name


def test_sizes_are_looked_at_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match=r"bomb.png has 30000 x 30000 pixels.*--max-image-pixels"):
        load_image(path)
    Image.fromarray(HALVES).save(path)
    with pytest.raises(InputError, match=r"40 x 20 pixels, more than --max-image-pixels 799"):
        load_image(path, limits=MediaLimits(image_pixels=799))
    assert load_image(path, limits=MediaLimits(image_pixels=800)).size == (40, 20)
