"""Audio files as samples at a model's rate.

Shape legend: L samples.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.sound_tracks import read_track, track_header
from megatron.mimo.data.media.source import (
    MediaLimits,
    MediaSource,
    openable,
    require_file,
    require_seconds,
    shown,
    undecodable,
)

__all__ = ["audio_length", "load_audio", "require_finite"]

_RATES = (1_000, 1_000_000)  # Hz; others are damage, and resampling from them takes gigabytes
_SAMPLES = 2**28  # of all channels; 1 GiB as float32
_UNRECOGNISED = 1  # soundfile's code of an error
_PLAIN = (1, 3, 0xFFFE)  # WAV formats that scipy reads: PCM, float, extensible


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file says of itself, and how it is read."""

    rate: int
    frames: int
    channels: int
    read: Callable[[MediaSource], np.ndarray]  # float [L] or [L, channels]
    is_exact: bool = True  # reading gives ``frames`` samples, or fails


def load_audio(
    path: MediaSource,
    *,
    sampling_rate: int,
    longest: float | None = None,
    limits: MediaLimits | None = None,
) -> np.ndarray:
    """Read an audio file: the mean of its channels, at another rate if need be.

    WAV of whole or floating-point numbers needs nothing beyond this package's dependencies; other
    formats need soundfile, and those that it does not know PyAV.

    Args:
        path: the file.
        sampling_rate: in Hz, of the result.
        longest: seconds that the model hears; more is an error, before anything is decoded.
        limits: where it may lie, and how long it may last.

    Returns:
        float32 [L], in -1..1.

    Raises:
        InputError: there is no such file, it does not decode, is empty or too long, has an absurd
            rate or samples that are not finite.
    """
    from scipy.signal import resample_poly

    with _named(path):
        header = _header(path, longest, limits or MediaLimits())
        samples = header.read(path)
    mono_L = samples.mean(axis=1) if samples.ndim == 2 else samples
    if len(mono_L) == 0:
        raise InputError(
            f"audio {shown(path)} has no samples; replace the file or drop the conversation"
        )
    _require_heard(path, len(mono_L), header.rate, longest)  # some headers do not tell
    require_finite(mono_L, f"audio {shown(path)}", header.rate)
    up, down = _resampling(header.rate, sampling_rate)
    return (mono_L if up == down else resample_poly(mono_L, up, down)).astype(np.float32)


def audio_length(
    path: MediaSource,
    *,
    sampling_rate: int,
    longest: float | None = None,
    limits: MediaLimits | None = None,
) -> int | None:
    """L of what ``load_audio`` returns, from the file's header; None where only decoding tells.

    Raises:
        InputError: as ``load_audio``, as far as that is seen.
    """
    with _named(path):
        header = _header(path, longest, limits or MediaLimits())
    up, down = _resampling(header.rate, sampling_rate)
    return -(-header.frames * up // down) if header.is_exact and header.frames else None


def _resampling(rate: int, wanted: int) -> tuple[int, int]:
    """Factors by which the number of samples is multiplied and divided."""
    common = math.gcd(rate, wanted)
    return wanted // common, rate // common


def _header(path: MediaSource, longest: float | None, limits: MediaLimits) -> _Header:
    require_file(path, "audio", limits)
    header = _wav_header(path) or _sound_header(path) or _track_header(path)
    _check(path, header, longest, limits)
    return header


@contextmanager
def _named(path: MediaSource) -> Iterator[None]:
    """Turn whatever is raised in the block into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"audio {shown(path)} is not WAV of plain samples, and reading other formats needs "
            "soundfile and PyAV; convert the file, or pip install 'megatron-mimo[media]'"
        ) from error
    except Exception as error:  # damaged headers raise nearly every kind
        raise undecodable(path, "audio", error) from error


def require_finite(samples_L: np.ndarray, what: str, rate: int) -> None:
    """Refuse samples that would make the loss NaN.

    Raises:
        InputError: one is not finite, as float32; the message says where.
    """
    with np.errstate(over="ignore"):
        is_bad_L = ~np.isfinite(np.asarray(samples_L, dtype=np.float32))
    if is_bad_L.any():
        first = int(is_bad_L.argmax())
        raise InputError(
            f"{what} has {int(is_bad_L.sum())} samples that are not finite, the first at "
            f"{first / rate:.3f} s; repair the file or drop the conversation"
        )


def _check(path: MediaSource, header: _Header, longest: float | None, limits: MediaLimits) -> None:
    if not _RATES[0] <= header.rate <= _RATES[1]:
        raise InputError(
            f"audio {shown(path)} says that it has {header.rate} samples per second; expected "
            f"{_RATES[0]} to {_RATES[1]}: its header is damaged, replace the file"
        )
    require_seconds(path, "audio", header.frames / header.rate, limits)
    _require_heard(path, header.frames, header.rate, longest)
    if header.frames * header.channels > _SAMPLES:
        raise InputError(
            f"audio {shown(path)} has {header.frames} samples in {header.channels} channels; "
            f"expected at most {_SAMPLES} together: cut it into clips"
        )


def _require_heard(path: MediaSource, frames: int, rate: int, longest: float | None) -> None:
    """Refuse a recording that the model's feature extractor would cut."""
    if longest is not None and frames > longest * rate + 0.5:
        raise InputError(
            f"audio {shown(path)} lasts {frames / rate:.1f} s, and the model hears {longest:.1f} "
            "s; cut it into clips"
        )


def _wav_header(path: MediaSource) -> _Header | None:
    """The header of a WAV file; None for other formats."""
    with _opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(12)[:4] != b"RIFF":
            return None
        found: tuple[int, int, int, int] | None = None
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"fmt ":
                kind, channels, rate, _, block = struct.unpack("<HHIIH", file.read(14))
                found = kind, channels, rate, block
                length -= 14
            elif name == b"data" and found is not None:
                kind, channels, rate, block = found
                frames = min(length, size - file.tell()) // max(block, 1)
                if kind not in _PLAIN:
                    return None  # soundfile knows how many samples a block holds
                return _Header(rate=rate, frames=frames, channels=channels, read=_read_wav)
            file.seek(length + length % 2, 1)
    raise ValueError("a WAV file without the chunks 'fmt ' and 'data'")


def _opened(path: MediaSource) -> BinaryIO:
    source = openable(path)
    return source.open("rb") if isinstance(source, Path) else source


def _sound_header(path: MediaSource) -> _Header | None:
    """The header of a file that soundfile reads; None for other formats."""
    import soundfile

    try:
        with _opened(path) as file:
            info = soundfile.info(file)
    except soundfile.LibsndfileError as error:
        if error.code != _UNRECOGNISED:
            raise
        return None
    return _Header(
        rate=info.samplerate,
        frames=info.frames,
        channels=info.channels,
        read=_read_sound,
        is_exact=info.format != "MP3",  # may say how long it was before it was cut
    )


def _track_header(path: MediaSource) -> _Header:
    rate, frames, channels = track_header(path)
    read = partial(read_track, most=_SAMPLES)
    return _Header(rate=rate, frames=frames, channels=channels, read=read, is_exact=False)


def _read_wav(path: MediaSource) -> np.ndarray:
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of notes behind the data
        _, samples = wavfile.read(openable(path))
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return np.asarray(samples)


def _read_sound(path: MediaSource) -> np.ndarray:
    import soundfile

    with _opened(path) as file:
        samples, _ = soundfile.read(file, dtype="float32")
    return np.asarray(samples)
