"""What a model is made of, and which part of it this rank runs."""

from megatron.core.models.mimo.config.base_configs import HeadSpec, MimoModelConfig
from megatron.core.models.mimo.config.role import (
    MIMO_LANGUAGE_MODULE_KEY,
    ModuleLayout,
    ModuleStageInfo,
    RankRole,
)

__all__ = [
    "MIMO_LANGUAGE_MODULE_KEY",
    "HeadSpec",
    "MimoModelConfig",
    "ModuleLayout",
    "ModuleStageInfo",
    "RankRole",
]
