"""Files are read to what was written into them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import FrameSampling, load_audio, load_image, load_video

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")

TIME = np.arange(8000) / 8000
WAVE = (0.5 * np.sin(2 * np.pi * 440 * TIME)).astype(np.float32)  # one second at 8 kHz
FRAMES = np.zeros((8, 32, 32, 3), dtype=np.uint8)
FRAMES[np.arange(8), :, :, 0] = np.arange(8)[:, None, None] * 30  # frame t is 30 t red


@pytest.mark.parametrize("kind", ["int16", "int32", "float32", "uint8"])
def test_wav_of_every_sample_type(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    scale = {"int16": 2**15, "int32": 2**31, "float32": 1, "uint8": 128}[kind]
    samples = WAVE.astype(np.float64) * scale + (128 if kind == "uint8" else 0)
    wavfile.write(path, 8000, samples.round(0 if kind != "float32" else 9).astype(kind))
    audio_L = load_audio(path, sampling_rate=8000)
    assert audio_L.dtype == np.float32
    assert np.abs(audio_L - WAVE).max() < (0.01 if kind == "uint8" else 1e-4)


def test_channels_are_averaged_and_rates_converted(tmp_path: Path) -> None:
    path = tmp_path / "stereo.flac"  # not WAV: soundfile reads it
    soundfile.write(path, np.stack([WAVE, np.zeros_like(WAVE)], axis=1), 8000)
    audio_L = load_audio(path, sampling_rate=16000)
    assert len(audio_L) == 16000
    expected_L = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(audio_L - expected_L)[100:-100].max() < 0.01


def test_videos_of_every_kind(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in FRAMES]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=250)
    (tmp_path / "frames").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "frames" / f"{number:03d}.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(4))
        stream.width = stream.height = 32
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    for name, tolerance in (("a.gif", 8), ("frames", 0), ("a.mp4", 12)):
        video = load_video(tmp_path / name)
        red_T = video.frames_THWC[..., 0].mean(axis=(1, 2))
        assert video.frames_THWC.shape == (8, 32, 32, 3), name
        assert np.abs(red_T - np.arange(8) * 30).max() <= tolerance, name
        assert video.fps == (24 if name == "frames" else 4), name
    half = load_video(tmp_path / "a.gif", FrameSampling(fps=2.0))
    assert half.fps == 2
    red_T = half.frames_THWC[..., 0].mean(axis=(1, 2))
    assert np.abs(red_T - np.array([0, 60, 150, 210])).max() <= 8  # first and last are kept


def test_images_are_rgb(tmp_path: Path) -> None:
    Image.new("LA", (3, 2), (200, 255)).save(tmp_path / "grey.png")
    image = load_image(tmp_path / "grey.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (200, 200, 200))


def test_what_does_not_decode_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.wav", "a.mp3", "a.mp4", "a.gif"):
        (tmp_path / name).write_bytes(b"RIFF nothing" if name == "a.wav" else b"nothing")
    (tmp_path / "empty").mkdir()
    for name, read in (
        ("a.png", load_image),
        ("a.wav", lambda path: load_audio(path, sampling_rate=8000)),
        ("a.mp3", lambda path: load_audio(path, sampling_rate=8000)),
        ("a.mp4", load_video),
        ("a.gif", load_video),
    ):
        with pytest.raises(InputError, match=rf"{name} does not decode as .*; replace the file"):
            read(tmp_path / name)
        with pytest.raises(InputError, match=r"none does not exist; correct the path"):
            read(tmp_path / "none")
    with pytest.raises(InputError, match=r"empty is a folder without files; expected one image"):
        load_video(tmp_path / "empty")
    wavfile.write(tmp_path / "silent.wav", 8000, np.zeros(0, dtype=np.int16))
    with pytest.raises(InputError, match=r"silent.wav has no samples"):
        load_audio(tmp_path / "silent.wav", sampling_rate=8000)
