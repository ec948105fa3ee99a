"""Image, audio and video files, as the processors of Hugging Face models take them."""

from megatron.mimo.data.clips import FrameSampling, Video, load_video, video_shape
from megatron.mimo.data.media_source import EncodedMedium, MediaLimits
from megatron.mimo.data.pictures import as_rgb, load_image
from megatron.mimo.data.recordings import audio_length, load_audio, require_finite

__all__ = [
    "EncodedMedium",
    "FrameSampling",
    "MediaLimits",
    "Video",
    "as_rgb",
    "audio_length",
    "load_audio",
    "load_image",
    "load_video",
    "require_finite",
    "video_shape",
]
