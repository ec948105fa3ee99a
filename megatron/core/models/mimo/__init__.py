"""Multimodal In/Out: encoders per modality and a GPT language model under Megatron parallelism."""

from megatron.core.models.mimo.config import MimoModelConfig
from megatron.core.models.mimo.model import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

__all__ = [
    "AudioModalitySubmodules",
    "MimoModel",
    "MimoModelConfig",
    "MimoOptimizer",
    "ModalitySubmodules",
    "VisionModalitySubmodules",
    "get_mimo_optimizer",
]
