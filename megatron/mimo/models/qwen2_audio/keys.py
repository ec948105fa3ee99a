"""Parameter names of Qwen2-Audio."""

from __future__ import annotations

import copy
from typing import Any

from megatron.mimo.models.common.audio_tower import AUDIO, ENCODER, audio_rows
from megatron.mimo.models.common.keys import KeyTable, Row
from megatron.mimo.models.common.language import ROTARY_BUFFERS, language_rows
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
        Row(
            mimo=f"{AUDIO}input_projections.0.linear_fc1.{kind}",
            hf=(f"multi_modal_projector.linear.{kind}",),
        )
        for kind in ("weight", "bias")
    )
    return KeyTable(
        rows=(
            *language_rows(
                text_config(config), model="language_model.model.", head="language_model."
            ),
            *audio_rows(config.audio_config, mimo=f"{AUDIO}encoders.{ENCODER}.", hf="audio_tower."),
            *projector,
        ),
        carried=ROTARY_BUFFERS,
        # transformers 5.20 saves its language model under one `model.` too many.
        aliases=(*MODULE_TREE, ("language_model.model.model.", "language_model.model.")),
    )
