"""Media that are decoded already are checked as files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.media import as_planes, read_medium
from megatron.mimo.data.conversation import ContentPart
from megatron.mimo.data.media.files import MediaLimits, Video
from tests.unit.mimo.data.chats import chat_of

SHADES = [Image.new("RGB", (6, 4), (number, 0, 0)) for number in range(3)]


def read(kind: str, value: Any, **settings: float) -> Any:
    family = {"image": "llava", "audio": "qwen2_audio", "video": "qwen2_5_vl"}[kind]
    part = ContentPart(kind=kind, value=value, settings=settings)
    return read_medium(part, chat_of(family).processor, video_fps=4.0, limits=MediaLimits())


def test_pictures_of_pillow_are_turned() -> None:
    turned = SHADES[0].copy()
    turned.getexif()[0x0112] = 6
    assert read("image", turned).size == (4, 6)
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert read("image", pixels) is pixels


@pytest.mark.parametrize(
    "frames", [SHADES, tuple(SHADES), np.stack([np.asarray(shade) for shade in SHADES])]
)
def test_lists_of_frames_are_a_video(frames: Any) -> None:
    video = read("video", frames)
    assert isinstance(video, Video)
    assert (video.frames_THWC[:, 0, 0, 0].tolist(), video.fps) == ([0, 1, 2], 4.0)


def test_lists_of_files_are_a_video(tmp_path: Path) -> None:
    for number, shade in enumerate(SHADES):
        shade.save(tmp_path / f"{number}.png")
    video = read("video", [tmp_path / "2.png", tmp_path / "0.png"])
    assert (video.frames_THWC[:, 0, 0, 0].tolist(), video.fps) == ([2, 0], 4.0)


LONG = np.zeros(40_000, np.float32)
REFUSED: dict[str, tuple[str, Any, str]] = {
    "address": ("image", "http://a/b.png", "an image is str; expected a Path, a Pillow image"),
    "nothing": ("image", None, "an image is NoneType; expected"),
    "nan": ("image", torch.full((3, 4, 4), torch.nan), "an image has pixels that are not finite"),
    "text": ("audio", "a.wav", "a recording is str; expected a Path or samples"),
    "stereo": ("audio", np.zeros((2, 40)), r"a recording has shape \[2, 40\]; expected samples"),
    "silence": ("audio", [], r"a recording has shape \[0\]"),
    "long": ("audio", LONG, r"a recording lasts \d.\d s, and the model hears 1.0 s"),
    "infinite": (
        "audio",
        [0.0, float("inf")],
        r"1 samples that are not finite, the first at 0.000",
    ),
    "name": ("video", "a.mp4", "a video is str; expected a Path, a Video, frames uint8"),
    "mixed": ("video", [SHADES[0], "a.png"], "a video is list; expected"),
    "no frames": ("video", [], "a video is list; expected"),
    "sizes": ("video", [*SHADES, Image.new("RGB", (5, 5))], "differ in size"),
    "grey": ("video", np.zeros((2, 4, 4), np.uint8), r"a video has shape \[2, 4, 4\]"),
}


@pytest.mark.parametrize(("kind", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_medium_is_refused(kind: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(kind, value)


def test_frames_are_chosen_of_files_only() -> None:
    with pytest.raises(InputError, match=r"a video that is decoded has \['fps'\]"):
        read("video", SHADES, fps=1.0)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "internvl"])
def test_planes_give_what_pictures_give(family: str) -> None:
    processor = chat_of(family).processor
    for size in ((40, 33), (64, 4), (3, 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        planes = as_planes(picture)
        assert np.array_equal(planes.movedim(0, 2).numpy(), pixels)
        if min(size) < 4 and family != "llava":
            continue
        expected = processor.image_processor(picture, return_tensors="pt")
        found = processor.image_processor(planes, return_tensors="pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(np.asarray(found[name]), np.asarray(value)), name
