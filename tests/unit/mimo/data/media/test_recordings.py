"""Headers are looked at before samples; what the samples are is checked."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.files import audio_length, load_audio

soundfile = pytest.importorskip("soundfile")

WAVE = (0.5 * np.sin(np.arange(8000) / 5)).astype(np.float32)


@pytest.mark.parametrize("kind", ["ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "PCM_24", "DOUBLE"])
def test_wav_of_other_codings(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, WAVE, 8000, subtype=kind)
    audio_L = load_audio(path, sampling_rate=8000)
    settled = slice(1000, len(WAVE))  # adaptive codings take some milliseconds
    assert np.abs(audio_L[settled] - WAVE[settled]).max() < 0.05


def test_without_soundfile_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "a.wav", WAVE, 8000, subtype="ULAW")
    wavfile.write(tmp_path / "plain.wav", 8000, WAVE)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(InputError, match=r"a.wav is not WAV of plain samples.*mimo\[media\]"):
        load_audio(tmp_path / "a.wav", sampling_rate=8000)
    assert len(load_audio(tmp_path / "plain.wav", sampling_rate=8000)) == len(WAVE)


@pytest.mark.parametrize("rate", [0, 1, 999, 4_294_967_295])
def test_absurd_rates_are_refused_before_anything_is_made_of_them(
    tmp_path: Path, rate: int
) -> None:
    path = tmp_path / "a.wav"
    wavfile.write(path, 8000, WAVE)
    held = bytearray(path.read_bytes())
    at = held.index(b"fmt ") + 12
    held[at : at + 4] = struct.pack("<I", rate)
    path.write_bytes(held)
    with pytest.raises(InputError, match=rf"a.wav says that it has {rate} samples per second"):
        load_audio(path, sampling_rate=16000)


def test_length_is_known_before_decoding(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, WAVE, 8000)
        held = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match=rf"{name} lasts 1.0 s, and the model hears 0.5 s"):
            load_audio(tmp_path / name, sampling_rate=8000, longest=0.5)
        (tmp_path / name).write_bytes(held[: len(held) // 2])  # nothing of it need be whole
        if name == "a.flac":
            with pytest.raises(InputError, match=r"lasts 1.0 s, and the model hears 0.7 s"):
                load_audio(tmp_path / name, sampling_rate=8000, longest=0.7)
        else:
            assert len(load_audio(tmp_path / name, sampling_rate=8000, longest=0.7)) < 4001


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_samples_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.wav"
    bad = WAVE.astype(np.float64)
    bad[4000] = value
    wavfile.write(path, 8000, bad)
    with pytest.raises(InputError, match=r"a.wav has 1 samples that are not finite.* at 0.500 s"):
        load_audio(path, sampling_rate=8000)


@pytest.mark.parametrize("name", ["a.m4a", "a.mka", "a.aac"])
def test_containers_are_read_through_pyav(tmp_path: Path, name: str) -> None:
    av = pytest.importorskip("av")
    sound = np.sin(np.arange(16000) * (2 * np.pi * 440 / 16000), dtype=np.float32)[None] * 0.5
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.rate = 16000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    read_L = load_audio(tmp_path / name, sampling_rate=16000)
    assert abs(len(read_L) - 16000) < 2500  # the coding fills up its last frames
    spectrum = np.abs(np.fft.rfft(read_L[4000:12000]))
    assert abs(spectrum.argmax() * 2 - 440) <= 2  # Hz
    assert np.abs(read_L[4000:12000]).max() == pytest.approx(0.5, abs=0.05)
    assert audio_length(tmp_path / name, sampling_rate=16000) is None
    with pytest.raises(InputError, match=rf"{name} lasts 1.* s, and the model hears 0.5 s"):
        load_audio(tmp_path / name, sampling_rate=16000, longest=0.5)  # AAC is found so afterwards
