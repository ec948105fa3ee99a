"""Parameter names of Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from megatron.mimo.models.common.keys import KeyTable
from megatron.mimo.models.common.language import ROTARY_BUFFERS, language_entries, text_config
from megatron.mimo.models.qwen2_5_vl.vision import vision_entries

__all__ = ["key_table"]


def key_table(config: Any) -> KeyTable:
    """Parameter names, in the spelling of the hub, which transformers writes too."""
    head = "lm_head.weight"
    return KeyTable(
        entries=(
            *language_entries(text_config(config), model="model.", head=""),
            *vision_entries(config.vision_config),
        ),
        carried=ROTARY_BUFFERS,
        # The module tree of transformers 5, which it does not write itself.
        aliases=(("model.language_model.", "model."), ("model.visual.", "visual.")),
        tied=((head, "model.embed_tokens.weight"),) if config.tie_word_embeddings else (),
    )
