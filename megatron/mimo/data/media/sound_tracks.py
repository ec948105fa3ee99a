"""The sound of containers that PyAV reads: M4A, AAC, the sound of videos.

Legend: L samples, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.media.frame_readers import readable
from megatron.mimo.data.media.source import MediaSource, shown

__all__ = ["read_track", "track_header"]


def track_header(path: MediaSource) -> tuple[int, int, int]:
    """Samples per second, samples of a channel as far as the container says, and channels.

    Raises:
        InputError: it has no sound.
    """
    import av

    with av.open(readable(path)) as container:
        stream = _sound(container, path)
        seconds = (container.duration or 0) / 1e6
        return int(stream.rate), round(seconds * stream.rate), int(stream.channels)


def read_track(path: MediaSource, most: int) -> np.ndarray:
    """float32 [L, C].

    Args:
        path: of the container.
        most: limit of samples, all channels together.

    Raises:
        InputError: it has no sound, or more samples than the limit.
    """
    import av

    pieces, count = list[np.ndarray](), 0
    with av.open(readable(path)) as container:
        stream = _sound(container, path)
        plain = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        for frame in container.decode(stream):
            for one in plain.resample(frame):
                pieces.append(one.to_ndarray())
                count += pieces[-1].size
            if count > most:
                raise InputError(
                    f"audio {shown(path)} has more than {most} samples; cut it into clips"
                )
        pieces += [one.to_ndarray() for one in plain.resample(None)]
    return np.concatenate(pieces, axis=1).T if pieces else np.zeros((0, 1), dtype=np.float32)


def _sound(container: Any, path: MediaSource) -> Any:
    if not container.streams.audio:
        raise InputError(f"{shown(path)} holds no sound; give it as a video, or drop it")
    return container.streams.audio[0]
