"""Encoders: from the tensors of one modality to embedding rows."""

from megatron.mimo.encoders.any_resolution import (
    NEWLINE,
    AnyResolutionSubmodules,
    NewlineProjection,
)
from megatron.mimo.encoders.clip import ClipEncoder, layer_numbers
from megatron.mimo.encoders.hugging_face import HuggingFaceEncoder
from megatron.mimo.encoders.perceiver import PerceiverResampler
from megatron.mimo.encoders.plain import activation_function, plain_encoder_config
from megatron.mimo.encoders.projectors import PooledProjector, Projector, SquareProjector
from megatron.mimo.encoders.qwen2_5_vl import PatchMerger, WindowTransformer
from megatron.mimo.encoders.vit import VisionTransformer, encoder_config
from megatron.mimo.encoders.whisper import WhisperEncoder

__all__ = [
    "NEWLINE",
    "AnyResolutionSubmodules",
    "ClipEncoder",
    "HuggingFaceEncoder",
    "NewlineProjection",
    "PatchMerger",
    "PerceiverResampler",
    "PooledProjector",
    "Projector",
    "SquareProjector",
    "VisionTransformer",
    "WhisperEncoder",
    "WindowTransformer",
    "activation_function",
    "encoder_config",
    "layer_numbers",
    "plain_encoder_config",
]
