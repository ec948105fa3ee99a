"""How media are read: flags of training and generation, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.media.source import MediaLimits

__all__ = [
    "MEDIA_FILE",
    "VIDEO_FPS",
    "add_media_arguments",
    "keep_media_settings",
    "kept_video_fps",
    "media_limits",
]

VIDEO_FPS = 2.0
MEDIA_FILE = "mimo_media.json"  # in a checkpoint's folder hf


def add_media_arguments(parser: ArgumentParser, *, video_fps: float | None) -> None:
    """Add the flags.

    Args:
        parser: of a command.
        video_fps: the default; None where it is what the checkpoint was trained with.
    """
    limits = MediaLimits()
    group = parser.add_argument_group(title="media")
    group.add_argument(
        "--video-fps",
        type=float,
        default=video_fps,
        metavar="N",
        help="frames per second that are kept of videos (default: "
        + ("as in training)" if video_fps is None else "%(default)s)"),
    )
    group.add_argument(
        "--max-image-pixels",
        type=int,
        default=limits.image_pixels,
        metavar="N",
        help="larger images and frames are refused before they are decoded (default: %(default)s)",
    )
    group.add_argument(
        "--max-video-pixels",
        type=int,
        default=limits.video_pixels,
        metavar="N",
        help="likewise for all frames together that are kept of a video (default: %(default)s)",
    )
    group.add_argument(
        "--max-video-frames",
        type=int,
        default=limits.video_frames,
        metavar="N",
        help="videos of which more frames would be kept are refused (default: %(default)s)",
    )
    group.add_argument(
        "--max-media-seconds",
        type=float,
        default=limits.seconds,
        metavar="S",
        help="videos and recordings that last longer are refused (default: %(default)s)",
    )
    group.add_argument(
        "--media-root",
        metavar="DIR",
        help="media outside of this folder are refused, links followed (default: any file that "
        "the data names is read)",
    )


def media_limits(args: Namespace) -> MediaLimits:
    """What the flags say.

    Raises:
        ConfigError: no sensible numbers, or no such folder.
    """
    for flag in (
        *("video_fps", "max_image_pixels", "max_video_pixels", "max_video_frames"),
        "max_media_seconds",
    ):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; expected more than 0")
    root = None if args.media_root is None else Path(args.media_root)
    if root is not None and not root.is_dir():
        raise ConfigError(f"--media-root {root}: there is no such folder; correct the path")
    return MediaLimits(
        image_pixels=args.max_image_pixels,
        video_pixels=args.max_video_pixels,
        video_frames=args.max_video_frames,
        seconds=args.max_media_seconds,
        root=root,
    )


def keep_media_settings(folder: Path, *, video_fps: float) -> None:
    """Write down how a run reads media, so that generation reads them alike."""
    fresh = folder / f"{MEDIA_FILE}.new"
    fresh.write_text(json.dumps({"video_fps": video_fps}) + "\n")
    fresh.replace(folder / MEDIA_FILE)


def kept_video_fps(folder: Path) -> float:
    """Frames per second that a checkpoint was trained with; the default, if it does not say.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / MEDIA_FILE
    if not file.is_file():
        return VIDEO_FPS
    try:
        fps = json.loads(file.read_text())["video_fps"]
        if isinstance(fps, bool) or not 0 < fps < math.inf:
            raise ValueError(f"video_fps is {fps!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}; repair or delete it") from error
    return float(fps)
