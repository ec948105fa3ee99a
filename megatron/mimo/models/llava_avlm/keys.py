"""Parameter names of LLaVA with ears."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.audio_tower import AUDIO, ENCODER, audio_rows
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["key_table"]


def key_table(config: Any) -> KeyTable:
    """Parameter names: LLaVA's, those of the audio tower and of its projector."""
    projector = llava_kind.projector_rows(
        config, mimo=f"{AUDIO}input_projections.0.", hf="audio_projector."
    )
    tower = audio_rows(config.audio_config, mimo=f"{AUDIO}encoders.{ENCODER}.", hf="audio_tower.")
    return llava_kind.key_table(config, more=(*tower, *projector))
