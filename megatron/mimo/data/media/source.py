"""Where media come from, and the checks that need no decoding: kind of file, sizes, durations."""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.mimo.errors import InputError

__all__ = [
    "EncodedMedium",
    "MediaLimits",
    "MediaSource",
    "MediumError",
    "first_bytes",
    "openable",
    "require_file",
    "require_pixels",
    "require_seconds",
    "shown",
    "undecodable",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedMedium:
    """A media file that lies in memory: from a column of a table, a tar, a data URI.

    Attributes:
        data: the file's contents.
        name: what errors call it.
    """

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


MediaSource = Path | str | EncodedMedium


class MediumError(InputError):
    """A medium of a sample is refused.

    Attributes:
        medium: what errors call it.
    """

    def __init__(self, message: str, medium: str) -> None:
        super().__init__(message, medium)
        self.medium = medium

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What is read of media files.

    Attributes:
        image_pixels: of an image, or of one frame of a video.
        video_pixels: of all frames together that are kept of a video; each takes 3 bytes.
        video_frames: that are kept of a video.
        seconds: that a recording or a video lasts.
        root: media lie in this folder, links followed; None for anywhere.
    """

    image_pixels: int = 64_000_000
    video_pixels: int = 512_000_000
    video_frames: int = 4096
    seconds: float = 14_400.0
    root: Path | None = None


def require_file(
    path: MediaSource, what: str, limits: MediaLimits, *, folder: bool = False
) -> None:
    """Refuse what is no regular file; nothing is opened, so that a pipe cannot hold up a run.

    Args:
        path: of a medium.
        what: its kind, for errors.
        limits: with the folder that it has to lie in.
        folder: a folder is taken, too.

    Raises:
        InputError: there is nothing, or something else; it lies outside of ``limits.root``.
    """
    if isinstance(path, EncodedMedium):
        return
    try:
        mode = Path(path).stat().st_mode
        real = Path(path).resolve() if limits.root is not None else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{what} {shown(path)} does not exist; correct the path (--media-folder says what "
            "those in data files are relative to)"
        ) from error
    except (OSError, ValueError) as error:  # too long, a loop of links, no access, a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{what} {shown(path)} cannot be read: {reason}; correct the path"
        ) from error
    if limits.root is not None and real and not real.is_relative_to(limits.root.resolve()):
        raise InputError(
            f"{what} {shown(path)} lies outside of --media-root {limits.root}; move it there, or "
            "give the folder that holds all media"
        )
    if stat.S_ISREG(mode) or (folder and stat.S_ISDIR(mode)):
        return
    kind = next(
        name
        for test, name in (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISSOCK, "a socket"),
            (lambda _: True, "a device"),
        )
        if test(mode)
    )
    raise InputError(f"{what} {shown(path)} is {kind}; expected a regular file")


def require_pixels(
    path: MediaSource, width: int, height: int, limit: int, *, frames: int = 1
) -> None:
    """Refuse images, or the frames of a video, that would not fit into memory.

    Raises:
        InputError: more than ``limit`` pixels.
    """
    if width * height * frames <= limit:
        return
    sizes = f"{width} x {height} pixels"
    if frames == 1:
        raise InputError(
            f"{shown(path)} has {sizes}, more than --max-image-pixels {limit}; make it smaller, or "
            "raise the limit"
        )
    raise InputError(
        f"video {shown(path)}: {frames} frames of {sizes} are more than --max-video-pixels "
        f"{limit}; keep fewer with --video-fps, cut it into clips, or raise the limit"
    )


def require_seconds(path: MediaSource, kind: str, seconds: float, limits: MediaLimits) -> None:
    """Refuse a recording or video that is so long that its header is damaged, or malicious.

    Raises:
        InputError: it lasts longer than ``limits.seconds``.
    """
    if not seconds <= limits.seconds:
        raise InputError(
            f"{kind} {shown(path)} lasts {seconds:.0f} s, more than --max-media-seconds "
            f"{limits.seconds:g}; cut it into clips, or raise the limit"
        )


def undecodable(path: MediaSource, what: str, error: Exception) -> InputError:
    """The error for a file that is damaged, or no such medium."""
    reason = str(error) or type(error).__name__
    return InputError(
        f"{shown(path)} does not decode as {what}: {reason[:300]}; replace the file or drop the "
        "conversation"
    )


def openable(path: MediaSource) -> Path | io.BytesIO:
    """What libraries that read files take: a path, or an open file in memory."""
    return io.BytesIO(path.data) if isinstance(path, EncodedMedium) else Path(path)


def first_bytes(path: MediaSource, count: int) -> bytes:
    """The first bytes of a medium, which tell its format more reliably than its name."""
    if isinstance(path, EncodedMedium):
        return path.data[:count]
    with Path(path).open("rb") as file:
        return file.read(count)


def shown(path: object) -> str:
    """A path as errors show it: the middle of a very long one is left out."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
