"""Frames are kept by the time at which they are shown, upright, and in the order of numbers."""

from __future__ import annotations

import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import MediaLimits, Video, load_video
from megatron.mimo.data.media.videos import FrameSampling, choose

av = pytest.importorskip("av")

SHADES = [Image.new("RGB", (16, 16), (number * 20, 0, 0)) for number in range(12)]


def shades(video: Video) -> list[int]:
    """Which of ``SHADES`` were kept."""
    return [round(red / 20) for red in video.frames_THWC[..., 0].mean(axis=(1, 2))]


def animation(path: Path, delays: int | list[int]) -> Path:
    SHADES[0].save(
        path,
        save_all=True,
        append_images=SHADES[1:],
        duration=delays,
        **({"lossless": True} if path.suffix == ".webp" else {}),
    )
    return path


def encoded(path: Path, stamps: list[int], *, size: tuple[int, int] = (32, 32)) -> Path:
    """A clip whose frame k is k * 20 red and appears at stamps[k] hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = size
        stream.codec_context.time_base = Fraction(1, 100)
        for number, stamp in enumerate(stamps):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[..., 0] = number * 20 % 240
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_names_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 13):
        SHADES[number - 1].save(tmp_path / f"frame_{number}.png")
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    (tmp_path / "thumbnails").mkdir()
    assert shades(load_video(tmp_path)) == list(range(12))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize(
    ("delays", "fps", "expected"),
    [
        (500, 2.0, list(range(12))),
        (40, 2.0, [0]),
        (250, 2.0, [0, 2, 4, 7, 9, 11]),
        ([1000] + [100] * 11, 2.0, [0, 1, 4, 11]),  # at 0, 0.67, 1.33 and 2.0 s
    ],
)
def test_animations_go_as_fast_as_they_say(
    tmp_path: Path, suffix: str, delays: int | list[int], fps: float, expected: list[int]
) -> None:
    path = animation(tmp_path / f"a{suffix}", delays)
    seconds = (sum(delays) if isinstance(delays, list) else 12 * delays) / 1000
    whole = load_video(path)
    assert shades(whole) == list(range(12))
    assert whole.fps == pytest.approx(12 / seconds, abs=1e-5)
    kept = load_video(path, FrameSampling(fps=fps))
    assert shades(kept) == expected
    assert kept.fps == pytest.approx(len(expected) / seconds, abs=1e-5)


def test_a_variable_rate_is_kept_by_time(tmp_path: Path) -> None:
    stamps = [0, 100, 200, 210, 220, 230, 240, 250, 260, 270, 280, 290]
    path = encoded(tmp_path / "a.mp4", stamps)
    kept = load_video(path, FrameSampling(fps=2.0))
    moments = np.linspace(0, 290, 6)
    assert shades(kept) == [int(np.abs(np.array(stamps) - at).argmin()) for at in moments]
    assert shades(load_video(path)) == list(range(12))


def test_what_a_part_asks_for() -> None:
    times, end = [number / 2 for number in range(12)], 6.0
    four, fps = choose(times, end, FrameSampling(nframes=4))
    assert (four, fps) == ([0, 4, 7, 11], pytest.approx(4 / 6, abs=1e-6))
    assert choose(times, end, FrameSampling(fps=0.5))[0] == [0, 6, 11]
    assert choose(times, end, FrameSampling(video_start=0.0, video_end=1.0)) == ([0, 1, 2], 2.0)
    assert choose(times, end, FrameSampling(video_start=5.0)) == ([10, 11], 2.0)
    with pytest.raises(InputError, match=r"no frame appears between 7 s and inf s of 6 s"):
        choose(times, end, FrameSampling(video_start=7.0))
    with pytest.raises(InputError, match=r"nframes is 13 and there are 12 frames"):
        choose(times, end, FrameSampling(nframes=13))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),  # held upright, as phones write it
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    ],
)
def test_clips_are_turned_as_their_display_matrix_says(
    tmp_path: Path, matrix: tuple[int, int, int, int], turned: object
) -> None:
    path = tmp_path / "a.mp4"
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32, 0] = pixels[24:, 32:, 1] = 240
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    plain = load_video(path).frames_THWC[0]
    one, held = 0x10000, bytearray(path.read_bytes())
    unit = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
    at = held.find(unit, held.find(b"tkhd"))
    a, b, c, d = (value * one for value in matrix)
    held[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(held)
    assert callable(turned)
    assert np.array_equal(load_video(path).frames_THWC[0], turned(plain))


def test_only_what_is_kept_is_held(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.mp4", [4 * number for number in range(200)], size=(320, 240))
    whole = 200 * 320 * 240 * 3
    tracemalloc.start()
    kept = load_video(path, FrameSampling(fps=1.0))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept.frames_THWC) == 8
    assert most < whole / 8
    with pytest.raises(InputError, match=r"8 frames of 320 x 240 pixels .*--max-video-pixels 600"):
        load_video(path, FrameSampling(fps=1.0), limits=MediaLimits(video_pixels=600_000))
    with pytest.raises(InputError, match="more than --max-image-pixels 76799"):
        load_video(path, FrameSampling(fps=1.0), limits=MediaLimits(image_pixels=76_799))


def test_lists_of_frames_and_frames_of_other_sizes(tmp_path: Path) -> None:
    for number in range(3):
        SHADES[number].save(tmp_path / f"{number}.png")
    files = tuple(tmp_path / f"{number}.png" for number in (2, 0, 1))
    video = load_video(files, FrameSampling(folder_fps=2.0))
    assert (shades(video), video.fps) == ([2, 0, 1], 2.0)
    assert shades(load_video(files, FrameSampling(folder_fps=2.0, fps=1.0))) == [2, 1]
    Image.new("RGB", (8, 16)).save(tmp_path / "3.png")
    with pytest.raises(InputError, match=r"frame 3 is 8 x 16 pixels and the first 16 x 16"):
        load_video(tmp_path)
    with pytest.raises(InputError, match=r"gone.png does not exist"):
        load_video((tmp_path / "gone.png",))
