"""Parameter names of Qwen3-VL."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.frame_tower import vision_entries
from megatron.mimo.models.common.keys import KeyTable
from megatron.mimo.models.common.language import ROTARY_BUFFERS, language_entries, text_config

__all__ = ["key_table"]

_LANGUAGE = "model.language_model."


def key_table(config: Any) -> KeyTable:
    """Parameter names, in the one spelling that files and module tree have."""
    return KeyTable(
        entries=(
            *language_entries(text_config(config), model=_LANGUAGE, head="", experts="transposed"),
            *vision_entries(config.vision_config),
        ),
        carried=ROTARY_BUFFERS,
        tied=(("lm_head.weight", _LANGUAGE + "embed_tokens.weight"),)
        if config.tie_word_embeddings
        else (),
    )
