"""Videos: which frames are kept, by the time at which each is shown, and decoding them.

Legend: T frames, H height, W width; times are in seconds from the first frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.frame_readers import Animation, Container, Frames, Pictures
from megatron.mimo.data.media.source import (
    EncodedMedium,
    MediaLimits,
    MediaSource,
    first_bytes,
    require_file,
    require_pixels,
    require_seconds,
    shown,
    undecodable,
)

__all__ = ["FrameSampling", "Video", "choose", "load_video", "video_shape"]

_FOLDER_FPS = 24.0
_BLUR = 1e-6  # seconds; times are sums of fractions, and not exact


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are kept.

    Attributes:
        fps: this many frames per second at most, evenly spread in time; None keeps all.
        nframes: this many, evenly spread in time, whatever ``fps``.
        video_start: nothing before this second.
        video_end: nothing behind it.
        folder_fps: frames per second that a folder or list holds; ``fps``, if None, or 24.
    """

    fps: float | None = None
    nframes: int | None = None
    video_start: float = 0.0
    video_end: float = math.inf
    folder_fps: float | None = None


_EVERY_FRAME = FrameSampling()


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Decoded frames.

    Attributes:
        frames_THWC: uint8 [T, H, W, 3].
        fps: frames per second.
    """

    frames_THWC: np.ndarray
    fps: float


def load_video(
    path: MediaSource | Sequence[MediaSource],
    sampling: FrameSampling = _EVERY_FRAME,
    *,
    limits: MediaLimits | None = None,
) -> Video:
    """Read a video: an animated image (GIF, WebP), a folder of frames in the order of their names
    (2 before 10), a list of them, or any format that PyAV knows. Memory holds only kept frames.

    Args:
        path: the file, folder or list of images.
        sampling: which frames are kept.
        limits: how large, and where it may lie.

    Raises:
        InputError: there is nothing at ``path``, it does not decode, has too many pixels, or no
            such frames.
    """
    with _named(path) as name:
        frames, picked, kept_fps = _kept(path, name, sampling, limits or MediaLimits())
        frames_THWC = np.empty((0, 0, 0, 3), dtype=np.uint8)
        for number, frame_HWC in enumerate(frames.read(picked)):
            if not number:
                frames_THWC = np.empty((len(picked), *frame_HWC.shape), dtype=np.uint8)
            elif frame_HWC.shape != frames_THWC.shape[1:]:
                raise InputError(
                    f"frame {number} is {frame_HWC.shape[1]} x {frame_HWC.shape[0]} pixels and the "
                    f"first {frames_THWC.shape[2]} x {frames_THWC.shape[1]}; give frames of one "
                    "size"
                )
            frames_THWC[number] = frame_HWC
    return Video(frames_THWC=frames_THWC, fps=kept_fps)


def video_shape(
    path: MediaSource | Sequence[MediaSource],
    sampling: FrameSampling = _EVERY_FRAME,
    *,
    limits: MediaLimits | None = None,
) -> tuple[int, int, int, float]:
    """T, H, W and frames per second of what ``load_video`` returns; decodes a single frame.

    Raises:
        InputError: as ``load_video``, as far as that is seen.
    """
    with _named(path) as name:
        frames, picked, kept_fps = _kept(path, name, sampling, limits or MediaLimits())
        first_HWC = next(iter(frames.read(picked[:1])))
        return len(picked), first_HWC.shape[0], first_HWC.shape[1], kept_fps


def _kept(
    path: MediaSource | Sequence[MediaSource],
    name: MediaSource,
    sampling: FrameSampling,
    limits: MediaLimits,
) -> tuple[Frames, list[int], float]:
    """A video's frames, the numbers of those that are kept, and these per second."""
    frames = _open(path, sampling.folder_fps or sampling.fps or _FOLDER_FPS, limits)
    picked, kept_fps = choose(frames.times, frames.end, sampling)
    require_seconds(name, "video", frames.end, limits)
    if len(picked) > limits.video_frames:
        raise InputError(
            f"{len(picked)} frames would be kept, more than --max-video-frames "
            f"{limits.video_frames}; keep fewer with --video-fps, or raise the limit"
        )
    width, height = frames.size
    require_pixels(name, width, height, limits.image_pixels)
    require_pixels(name, width, height, limits.video_pixels, frames=len(picked))
    return frames, picked, kept_fps


@contextmanager
def _named(path: MediaSource | Sequence[MediaSource]) -> Iterator[MediaSource]:
    """What errors call a video; whatever is raised in the block names it."""
    named = path if isinstance(path, MediaSource) else _of_frames(path[0])
    try:
        yield named
    except InputError as error:
        raise InputError(
            str(error) if shown(named) in str(error) else f"video {shown(named)}: {error}"
        ) from error
    except ImportError as error:
        raise InputError(
            f"video {shown(named)}: reading this format needs PyAV; pip install "
            "'megatron-mimo[media]', or give an animated GIF or a folder of frames"
        ) from error
    except Exception as error:  # codecs raise nearly every kind
        raise undecodable(named, "a video", error) from error


def choose(times: Sequence[float], end: float, sampling: FrameSampling) -> tuple[list[int], float]:
    """The numbers of the frames that are kept, and how many these are per second.

    Kept are the frames nearest to moments that are evenly spread from the first to the last. A
    frame that is shown for long may be kept twice, because the model assumes equal distances.

    Args:
        times: at which each frame appears, rising.
        end: when the last one disappears.
        sampling: what is asked for.

    Raises:
        InputError: there are no such frames.
    """
    fps, nframes = sampling.fps, sampling.nframes
    start, stop = sampling.video_start, sampling.video_end
    times_T = np.asarray(times)
    inside_T = np.flatnonzero((times_T >= start - _BLUR) & (times_T <= stop + _BLUR))
    if not len(inside_T):
        raise InputError(
            f"no frame appears between {start:g} s and {stop:g} s of {end:g} s; correct "
            "video_start and video_end"
        )
    first, last = int(inside_T[0]), int(inside_T[-1])
    gone = float(times_T[last + 1]) if last + 1 < len(times_T) else end
    seconds, count = gone - float(times_T[first]), len(inside_T)
    if nframes is not None:
        if nframes > count:
            raise InputError(f"nframes is {nframes} and there are {count} frames; ask for fewer")
        count = int(nframes)
    elif fps is not None:
        count = min(count, max(1, round(seconds * fps)))
    rate = round(count / seconds, 6) if seconds > 0 else fps or _FOLDER_FPS
    if fps is None and count == len(inside_T):
        return inside_T.tolist(), rate
    moments = np.linspace(times_T[first], times_T[last], count)
    nearest = np.interp(moments, times_T[inside_T], inside_T).round(6).round().astype(int)
    return nearest.tolist(), rate


def _open(path: MediaSource | Sequence[MediaSource], rate: float, limits: MediaLimits) -> Frames:
    if not isinstance(path, MediaSource):
        return Pictures(path, rate, limits)
    require_file(path, "video", limits, folder=True)
    folder = None if isinstance(path, EncodedMedium) else Path(path)
    if folder is not None and folder.is_dir():
        files = [file for file in folder.iterdir() if not file.name.startswith(".")]
        files = sorted((file for file in files if not file.is_dir()), key=_natural)
        if not files:
            raise InputError(
                f"video {shown(path)} is a folder without files; expected one image for each frame"
            )
        return Pictures(files, rate, limits)
    start = first_bytes(path, 12)
    if start[:4] == b"GIF8" or (start[:4] == b"RIFF" and start[8:] == b"WEBP"):
        return Animation(path, limits)
    return Container(path, limits)


def _of_frames(first: MediaSource) -> MediaSource:
    """What errors call a list of frames: the folder of the first."""
    return first if isinstance(first, EncodedMedium) else Path(first).parent


def _natural(file: Path) -> list[tuple[int, str]]:
    """Digits of a name compare as numbers: frame_2 before frame_10; then the name decides."""
    pieces = re.findall(r"(\d+)|(\D+)", file.name)
    ranked = [(int(digits), "") if digits else (-1, text) for digits, text in pieces]
    return [*ranked, (-2, file.name)]
