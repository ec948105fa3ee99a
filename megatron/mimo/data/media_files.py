"""Image, audio and video files, as the processors of Hugging Face models take them.

Shape legend: T frames, H height, W width, L audio samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.core.models.mimo.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Video", "load_audio", "load_image", "load_video"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Decoded frames.

    Attributes:
        frames_THWC: uint8 [T, H, W, 3].
        fps: frames per second.
    """

    frames_THWC: np.ndarray
    fps: float


def load_image(path: Path | str) -> Image:
    """Read an image file of any format that Pillow knows, as RGB.

    Raises:
        InputError: there is no such file, or it does not decode.
    """
    from PIL import Image

    _require(path, "image")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # codecs raise nearly every kind, SyntaxError among them
        raise _undecodable(path, "an image", error) from error


def load_audio(path: Path | str, *, sampling_rate: int) -> np.ndarray:
    """Read an audio file: the mean of its channels, at another rate if need be.

    WAV needs nothing beyond this package's dependencies; other formats need soundfile.

    Args:
        path: the file.
        sampling_rate: in Hz, of the result.

    Returns:
        float32 [L], in -1..1.

    Raises:
        InputError: there is no such file, it does not decode or it is empty.
    """
    from scipy.signal import resample_poly

    _require(path, "audio")
    try:
        samples, rate = _read_wav(path) if _is_wav(path) else _read_sound(path)
    except ImportError as error:
        raise InputError(
            f"audio {path} is not WAV, and reading other formats needs soundfile; convert the "
            "file, or pip install 'megatron-mimo[media]'"
        ) from error
    except Exception as error:  # damaged headers raise nearly every kind
        raise _undecodable(path, "audio", error) from error
    mono_L = samples.mean(axis=1) if samples.ndim == 2 else samples
    if len(mono_L) == 0:
        raise InputError(f"audio {path} has no samples; replace the file or drop the conversation")
    if rate != sampling_rate:
        common = math.gcd(rate, sampling_rate)
        mono_L = resample_poly(mono_L, sampling_rate // common, rate // common)
    return mono_L.astype(np.float32)


def load_video(path: Path | str, *, fps: float | None = None) -> Video:
    """Read a video: an animated image (GIF, WebP), a folder of frames in the order of their names,
    or any format that PyAV knows.

    Args:
        path: the file or folder. A folder's frames count as 24 per second, unless ``fps`` is given.
        fps: keep this many frames per second at most, evenly spread; None keeps all.

    Raises:
        InputError: there is nothing at ``path``, or it does not decode.
    """
    _require(path, "video")
    try:
        if Path(path).is_dir():
            files = sorted(file for file in Path(path).iterdir() if file.is_file())
            if not files:
                raise InputError(
                    f"video {path} is a folder without files; expected one image for each frame"
                )
            video = Video(
                frames_THWC=np.stack([np.asarray(load_image(file)) for file in files]),
                fps=fps or 24.0,
            )
        elif Path(path).suffix.lower() in (".gif", ".webp"):
            video = _read_animation(path)
        else:
            video = _read_container(path)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"video {path}: reading this format needs PyAV; pip install 'megatron-mimo[media]', "
            "or give an animated GIF or a folder of frames"
        ) from error
    except Exception as error:
        raise _undecodable(path, "a video", error) from error
    if fps is None or fps >= video.fps:
        return video
    count = max(1, round(len(video.frames_THWC) * fps / video.fps))
    kept = np.linspace(0, len(video.frames_THWC) - 1, count).round().astype(int)
    return Video(frames_THWC=video.frames_THWC[kept], fps=fps)


def _require(path: Path | str, what: str) -> None:
    if not Path(path).exists():
        raise InputError(f"{what} {path} does not exist; correct the path")


def _undecodable(path: Path | str, what: str, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(
        f"{path} does not decode as {what}: {reason}; replace the file or drop the conversation"
    )


def _is_wav(path: Path | str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"RIFF"


def _read_wav(path: Path | str) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    rate, samples = wavfile.read(path)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128, rate
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min), rate
    return samples, rate


def _read_sound(path: Path | str) -> tuple[np.ndarray, int]:
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    return samples, rate


def _read_animation(path: Path | str) -> Video:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        delay = float(image.info.get("duration", 0)) or 100.0  # milliseconds
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return Video(frames_THWC=np.stack(frames), fps=1000 / delay)


def _read_container(path: Path | str) -> Video:
    import av

    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        fps = float(stream.average_rate or 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return Video(frames_THWC=np.stack(frames), fps=fps)
