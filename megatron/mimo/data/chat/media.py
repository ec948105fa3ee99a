"""The media of a conversation in the form that a processor takes, from files or decoded already.

Legend: L audio samples, T frames, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import ContentPart
from megatron.mimo.data.media.files import (
    EncodedMedium,
    FrameSampling,
    MediaLimits,
    Video,
    as_rgb,
    audio_length,
    load_audio,
    load_image,
    load_video,
    require_finite,
    video_shape,
)

__all__ = ["as_planes", "length_of_recording", "read_medium", "shape_of_video"]


def read_medium(part: ContentPart, processor: Any, *, video_fps: float, limits: MediaLimits) -> Any:
    """The medium of a part: a Pillow image or array, float32 [L], or a ``Video``.

    Args:
        part: a medium.
        processor: of Hugging Face.
        video_fps: frames per second that are kept of a video file, and that frames given one by
            one are of.
        limits: of files.

    Raises:
        InputError: the file is refused, or the value is no medium of its kind.
    """
    if part.kind == "image":
        return _image(part.value, limits)
    if part.kind == "audio":
        return _recording(part.value, processor.feature_extractor, limits)
    return _video(part, video_fps, limits)


def length_of_recording(part: ContentPart, processor: Any, *, limits: MediaLimits) -> int | None:
    """L of a recording, from its header alone; None where the header does not tell.

    Raises:
        InputError: as ``read_medium``, as far as that is seen.
    """
    if not isinstance(part.value, Path | EncodedMedium):
        return None
    return audio_length(part.value, **_hearing(processor.feature_extractor), limits=limits)


def _image(value: Any, limits: MediaLimits) -> Any:
    if isinstance(value, Path | EncodedMedium):
        return load_image(value, limits=limits)
    if _is_picture(value):
        return as_rgb(value)
    if isinstance(value, np.ndarray | torch.Tensor):
        pixels = np.asarray(value)
        if np.issubdtype(pixels.dtype, np.floating) and not np.isfinite(pixels).all():
            raise InputError("an image has pixels that are not finite; repair it")
        return value
    raise _no_medium("an image", value, "a Path, a Pillow image or an array")


def _recording(value: Any, extractor: Any, limits: MediaLimits) -> np.ndarray:
    rate, room = extractor.sampling_rate, extractor.n_samples
    if isinstance(value, Path | EncodedMedium):
        return load_audio(value, **_hearing(extractor), limits=limits)
    try:
        audio_L = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise _no_medium("a recording", value, "a Path or samples [L]") from error
    if audio_L.ndim != 1 or not len(audio_L):
        raise InputError(f"a recording has shape {list(audio_L.shape)}; expected samples [L]")
    if len(audio_L) > room:
        raise InputError(
            f"a recording lasts {len(audio_L) / rate:.1f} s, and the model hears "
            f"{room / rate:.1f} s; cut it into clips"
        )
    require_finite(audio_L, "a recording", rate)
    return audio_L


def _hearing(extractor: Any) -> dict[str, Any]:
    """How ``load_audio`` reads a file for a feature extractor."""
    rate = extractor.sampling_rate
    return {"sampling_rate": rate, "longest": extractor.n_samples / rate}


def _video(part: ContentPart, video_fps: float, limits: MediaLimits) -> Video:
    value, settings = part.value, dict[str, Any](part.settings)
    is_list = isinstance(value, list | tuple) and bool(value)
    if _is_undecoded(value):
        return load_video(value, _sampling(part, video_fps), limits=limits)
    if settings:
        raise InputError(
            f"a video that is decoded has {sorted(settings)}, which choose frames of a file; give "
            "the frames that are wanted"
        )
    if isinstance(value, Video):
        return value
    expected = "a Path, a Video, frames uint8 [T, H, W, 3] or a list of images"
    if is_list and all(map(_is_picture, value)):
        frames = [np.asarray(as_rgb(one)) for one in value]
        if len({frame_HWC.shape for frame_HWC in frames}) > 1:
            raise InputError("frames of a video differ in size; give frames of one size")
        value = np.stack(frames)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        raise _no_medium("a video", part.value, expected)
    if value.ndim != 4 or value.shape[3] != 3 or not len(value):
        raise InputError(f"a video has shape {list(value.shape)}; expected {expected}")
    return Video(frames_THWC=value, fps=video_fps)


def as_planes(image: Any) -> Any:
    """An RGB image of Pillow as uint8 [3, H, W]; another value as it is.

    Processors that compute with torch would make the same tensor, in twice the time.
    """
    if not _is_picture(image):
        return image
    planes = bytearray().join([image.tobytes("raw", colour) for colour in "RGB"])
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


def shape_of_video(
    part: ContentPart, *, video_fps: float, limits: MediaLimits
) -> tuple[int, int, int, float] | None:
    """T, H, W and frames per second of a video, without decoding it; None where it is decoded.

    Raises:
        InputError: as ``read_medium``, as far as that is seen.
    """
    if not _is_undecoded(part.value):
        return None
    return video_shape(part.value, _sampling(part, video_fps), limits=limits)


def _is_undecoded(value: Any) -> bool:
    """A video file, a folder of frames, or files of frames."""
    several = value if isinstance(value, list | tuple) else [value]
    return bool(several) and all(isinstance(one, Path | EncodedMedium) for one in several)


def _sampling(part: ContentPart, video_fps: float) -> FrameSampling:
    """Which frames of a part are kept."""
    settings = dict[str, Any](part.settings)
    if "nframes" not in settings:
        settings.setdefault("fps", video_fps)
    return FrameSampling(**settings, folder_fps=video_fps)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "getexif")  # of Pillow, which is not imported for that


def _no_medium(what: str, value: Any, expected: str) -> InputError:
    return InputError(
        f"the processor refuses it: {what} is {type(value).__name__}; expected {expected}"
    )
