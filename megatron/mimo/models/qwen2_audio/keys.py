"""Parameter names of Qwen2-Audio."""

from __future__ import annotations

import copy
from typing import Any

from megatron.mimo.models.common.audio_tower import AUDIO, TOWER, audio_entries
from megatron.mimo.models.common.keys import KeyEntry, KeyTable
from megatron.mimo.models.common.language import ROTARY_BUFFERS, language_entries
from megatron.mimo.models.common.llava_kind import MODULE_TREE

__all__ = ["key_table", "text_config"]


def text_config(config: Any) -> Any:
    """The language model's configuration; Hugging Face's model never ties its output layer."""
    text = copy.copy(config.text_config)
    text.tie_word_embeddings = False
    return text


def key_table(config: Any) -> KeyTable:
    """Parameter names."""
    projector = tuple(
        KeyEntry(
            mimo=f"{AUDIO}input_projections.0.linear_fc1.{kind}",
            hf=(f"multi_modal_projector.linear.{kind}",),
        )
        for kind in ("weight", "bias")
    )
    return KeyTable(
        entries=(
            *language_entries(
                text_config(config), model="language_model.model.", head="language_model."
            ),
            *audio_entries(config.audio_config, mimo=TOWER, hf="audio_tower."),
            *projector,
        ),
        carried=ROTARY_BUFFERS,
        # transformers 5.20 saves its language model under one `model.` too many.
        aliases=(*MODULE_TREE, ("language_model.model.model.", "language_model.model.")),
    )
