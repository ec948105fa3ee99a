"""Parameter names of LLaVA with ears."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.audio_tower import AUDIO, TOWER, audio_entries
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["key_table"]


def key_table(config: Any) -> KeyTable:
    """Parameter names: LLaVA's, those of the audio tower and of its projector."""
    projector = llava_kind.projector_entries(
        config, mimo=f"{AUDIO}input_projections.0.", hf="audio_projector."
    )
    tower = audio_entries(config.audio_config, mimo=TOWER, hf="audio_tower.")
    return llava_kind.key_table(config, more=(*tower, *projector))
