"""Parameter names of Qwen3.5."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.frame_tower import vision_entries
from megatron.mimo.models.common.keys import KeyTable
from megatron.mimo.models.common.language import ROTARY_BUFFERS, language_entries, text_config

__all__ = ["key_table"]

_LANGUAGE = "model.language_model."


def key_table(config: Any) -> KeyTable:
    """Parameter names, in the one spelling that files and module tree have.

    The layers for multi-token prediction, which neither transformers' model nor ours has, travel
    beside the checkpoint.
    """
    return KeyTable(
        entries=(
            *language_entries(text_config(config), model=_LANGUAGE, head="", experts="stacked"),
            *vision_entries(config.vision_config),
        ),
        carried=("mtp.*", *ROTARY_BUFFERS),
        tied=(("lm_head.weight", _LANGUAGE + "embed_tokens.weight"),)
        if config.tie_word_embeddings
        else (),
    )
