"""Image, audio and video files, as the processors of Hugging Face models take them."""

from megatron.mimo.data.media.image_files import as_rgb, load_image
from megatron.mimo.data.media.recordings import audio_length, load_audio, require_finite
from megatron.mimo.data.media.source import EncodedMedium, MediaLimits
from megatron.mimo.data.media.videos import FrameSampling, Video, load_video, video_shape

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
