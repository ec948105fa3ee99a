"""Media that lie in memory are read as files are; so are those that are odd or damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import (
    EncodedMedium,
    FrameSampling,
    MediaLimits,
    load_audio,
    load_image,
    load_video,
)

MEDIA = Path(__file__).parents[5] / "examples/data/media"


def held(path: Path) -> EncodedMedium:
    return EncodedMedium(data=path.read_bytes(), name=f"row 3, {path.name}")


def mp4(path: Path, stamps: list[int]) -> Path:
    """Frames that brighten, each shown at its stamp, in tenths of a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number, stamp in enumerate(stamps):
            pixels = np.full((32, 32, 3), number * 40, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_pictures_and_recordings_in_memory(tmp_path: Path) -> None:
    for path in (MEDIA / "cat.png", MEDIA / "dog.jpg"):
        assert np.array_equal(np.asarray(load_image(held(path))), np.asarray(load_image(path)))
    tone = MEDIA / "tone.wav"
    expected = load_audio(tone, sampling_rate=16000)
    assert np.array_equal(load_audio(held(tone), sampling_rate=16000), expected)
    soundfile = pytest.importorskip("soundfile")
    for name in ("a.flac", "a.ogg"):
        soundfile.write(tmp_path / name, np.stack([expected, -expected], axis=1), 44100)
        both = load_audio(held(tmp_path / name), sampling_rate=16000)
        assert np.array_equal(both, load_audio(tmp_path / name, sampling_rate=16000))
        assert np.abs(both).max() < 1e-3  # the mean of a sound and its opposite


def test_videos_in_memory(tmp_path: Path) -> None:
    for path in (MEDIA / "clip.gif", mp4(tmp_path / "a.mp4", [0, 1, 2, 3])):
        one, two = load_video(held(path)), load_video(path)
        assert np.array_equal(one.frames_THWC, two.frames_THWC)
        assert one.fps == two.fps
    frames = load_video([held(MEDIA / "cat.png"), MEDIA / "cat.png"], FrameSampling(folder_fps=2.0))
    assert np.array_equal(frames.frames_THWC[0], frames.frames_THWC[1])
    disguised = EncodedMedium(data=(MEDIA / "clip.gif").read_bytes(), name="clip.mp4")
    assert len(load_video(disguised).frames_THWC) == 4  # what it is counts, not its name


def test_a_variable_rate_in_a_container_is_kept_by_time(tmp_path: Path) -> None:
    video = load_video(mp4(tmp_path / "a.mp4", [0, 3, 9, 10]), FrameSampling(nframes=3))
    shades = video.frames_THWC[:, 0, 0, 0].astype(int)
    assert np.abs(shades - [0, 40, 120]).max() <= 12  # at 0, 0.5 (nearest: 0.3) and 1 s


def test_an_animation_in_place_of_an_image_gives_its_first_frame() -> None:
    first = load_video(MEDIA / "clip.gif").frames_THWC[0]
    assert np.array_equal(np.asarray(load_image(MEDIA / "clip.gif")), first)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_pictures_are_refused_by_name(kind: str) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, kind)
    half = EncodedMedium(data=file.getvalue()[: len(file.getvalue()) // 2], name="row 3, a.img")
    with pytest.raises(InputError, match=r"row 3, a.img does not decode as an image"):
        load_image(half)


def test_limits_are_looked_at_before_decoding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat.png has 32 x 32 pixels, more than --max-image"):
        load_image(held(MEDIA / "cat.png"), limits=MediaLimits(image_pixels=100))
    with pytest.raises(InputError, match=r"lasts 0 s, more than --max-media-seconds 0.1; cut"):
        load_audio(held(MEDIA / "tone.wav"), sampling_rate=8000, limits=MediaLimits(seconds=0.1))
    clip = mp4(tmp_path / "a.mp4", [0, 1, 2, 3])
    for path in (clip, MEDIA / "clip.gif"):
        with pytest.raises(InputError, match=r"--max-media-seconds 0.2; cut it into clips"):
            load_video(path, limits=MediaLimits(seconds=0.2))
        with pytest.raises(InputError, match=r"4 frames would be kept, more than --max-video-fr"):
            load_video(path, limits=MediaLimits(video_frames=3))
        three = load_video(path, FrameSampling(nframes=3), limits=MediaLimits(video_frames=3))
        assert len(three.frames_THWC) == 3
