"""Readers of frames: from image files, animations and containers. Each knows when frames appear.

Times are known without decoding, except of WebP, which tells them frame by frame.
Legend: H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.image_files import as_rgb, load_image, open_image
from megatron.mimo.data.media.source import (
    MediaLimits,
    MediaSource,
    openable,
    require_seconds,
    shown,
)

__all__ = ["Animation", "Container", "Frames", "Pictures", "readable"]

_DELAY = 0.1  # seconds, of an animation that says none


class Frames(Protocol):
    """A reader of frames, and what it knows before it decodes.

    Attributes:
        times: seconds at which each frame appears, from the first one, rising.
        end: when the last one disappears.
        size: width and height, as they are stored.
    """

    times: list[float]
    end: float
    size: tuple[int, int]

    def read(self, picked: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames with these numbers (rising, with repetitions), uint8 [H, W, 3]."""
        ...


class Pictures:
    """One image file for each frame."""

    def __init__(self, files: Sequence[MediaSource], fps: float, limits: MediaLimits) -> None:
        self._files, self._limits = files, limits
        self.times = [number / fps for number in range(len(files))]
        self.end = len(files) / fps
        self.size = load_image(files[0], limits=limits).size

    def read(self, picked: Sequence[int]) -> Iterator[np.ndarray]:
        """As ``Frames``."""
        for number in picked:
            yield np.asarray(load_image(self._files[number], limits=self._limits))


class Animation:
    """The frames of a GIF or WebP."""

    def __init__(self, path: MediaSource, limits: MediaLimits) -> None:
        self._path, self._limits = path, limits
        self.times, self.end = [], 0.0
        with open_image(path, limits) as image:
            self.size = image.size
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                if image.format == "WEBP":
                    image.load()
                self.times.append(self.end)
                self.end += float(image.info.get("duration") or 0) / 1000 or _DELAY

    def read(self, picked: Sequence[int]) -> Iterator[np.ndarray]:
        """As ``Frames``."""
        with open_image(self._path, self._limits) as image:
            for number in picked:
                image.seek(number)
                yield np.asarray(as_rgb(image))


class Container:
    """The frames of a container that PyAV reads, such as MP4."""

    def __init__(self, path: MediaSource, limits: MediaLimits) -> None:
        import av

        self._path = path
        with av.open(readable(path)) as container:
            stream = _video(container, path)
            if container.duration:  # in millionths of a second; as the header says
                require_seconds(path, "video", container.duration / 1e6, limits)
            self._rate = float(stream.average_rate or stream.guessed_rate or 24)
            self.size = (stream.codec_context.width, stream.codec_context.height)
            tick = float(stream.time_base or 0)
            stamps: list[Any] = []
            last = 0.0
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
                    if packet.pts is not None:
                        last = max(last, (packet.pts + (packet.duration or 0)) * tick)
        if not stamps:
            raise InputError("holds no frames; replace the file or drop the conversation")
        self._is_stamped = bool(tick) and None not in stamps
        if self._is_stamped:
            stamps.sort()
            self._origin = stamps[0] * tick
            self.times = [stamp * tick - self._origin for stamp in stamps]
            self.end = last - self._origin
            if self.end <= self.times[-1]:  # the last frame says no duration
                self.end = self.times[-1] + 1 / self._rate
        else:
            self._origin = 0.0
            self.times = [number / self._rate for number in range(len(stamps))]
            self.end = len(stamps) / self._rate

    def read(self, picked: Sequence[int]) -> Iterator[np.ndarray]:
        """As ``Frames``: each is the decoded frame nearest to the time of the wanted one."""
        wanted = [self.times[number] for number in picked]
        at = 0
        before: tuple[float, Any] | None = None
        for time, frame in self._decoded():
            while at < len(wanted) and time >= wanted[at]:
                is_nearer = before is not None and wanted[at] - before[0] < time - wanted[at]
                yield _upright(before[1] if is_nearer and before is not None else frame)
                at += 1
            if at == len(wanted):
                return
            before = time, frame
        if before is None:
            raise InputError("no frame of it decodes; replace the file or drop the conversation")
        for _ in wanted[at:]:
            yield _upright(before[1])

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        import av

        with av.open(readable(self._path)) as container:
            for number, frame in enumerate(container.decode(_video(container, self._path))):
                stamp = frame.time if self._is_stamped else None
                yield (number / self._rate if stamp is None else stamp - self._origin), frame


def readable(path: MediaSource) -> Any:
    """What PyAV opens."""
    source = openable(path)
    return source if isinstance(source, io.BytesIO) else str(source)


def _video(container: Any, path: MediaSource) -> Any:
    if not container.streams.video:
        raise InputError(f"{shown(path)} holds no video; give its sound as audio, or drop it")
    return container.streams.video[0]


def _upright(frame: Any) -> np.ndarray:
    """A frame turned as its display matrix says: phones store a matrix instead of turned pixels."""
    frame_HWC = np.asarray(frame.to_ndarray(format="rgb24"))
    given = frame.side_data.get("DISPLAYMATRIX")
    if given is None:
        return frame_HWC
    a, b, _, c, d, *_ = np.frombuffer(bytes(given), dtype=np.int32)[:9].tolist()
    if b == c == 0 and a and d:  # x' = a x, y' = d y
        across, down = a < 0, d < 0
    elif a == d == 0 and b and c:  # x' = c y, y' = b x
        frame_HWC = frame_HWC.transpose(1, 0, 2)
        across, down = c < 0, b < 0
    else:
        raise InputError(
            f"its display matrix turns frames by no quarter of a circle ({a}, {b}, {c}, {d} / "
            "65536); turn the pixels with ffmpeg and give that file"
        )
    return np.ascontiguousarray(frame_HWC[:: -1 if down else 1, :: -1 if across else 1])
