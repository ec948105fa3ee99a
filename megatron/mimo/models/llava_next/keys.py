"""Parameter names of LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common import llava_kind
from megatron.mimo.models.common.keys import KeyEntry, KeyTable

__all__ = ["key_table"]


def key_table(config: Any) -> KeyTable:
    """LLaVA's parameter names and the newline's."""
    newline = KeyEntry(
        mimo="modality_submodules.images.input_projections.0.newline", hf=("image_newline",)
    )
    return llava_kind.key_table(config, projector="projector.", more=(newline,))
