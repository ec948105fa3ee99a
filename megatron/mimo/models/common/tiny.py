"""What tiny configurations and random conversations of several families are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

__all__ = ["TINY_TEXT", "TINY_VISION", "random_text", "random_text_with_images"]


TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.2,
}


TINY_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,  # not what Megatron pads a vocabulary to
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}


def random_text(config: Any, placeholders: Sequence[int], generator: Generator) -> Tensor:
    """[L]: one to seven random tokens, none of which is special."""
    text = config.text_config
    special = [*placeholders, text.pad_token_id, text.bos_token_id, text.eos_token_id]
    is_word_V = torch.ones(text.vocab_size, dtype=torch.bool)
    is_word_V[[token for token in special if isinstance(token, int)]] = False
    words_V = is_word_V.nonzero().flatten()
    length = int(torch.randint(1, 8, (), generator=generator))
    return words_V[torch.randint(len(words_V), (length,), generator=generator)]


def random_text_with_images(config: Any, rows: list[int], generator: Generator) -> Tensor:
    """[1, L]: random text around images of so many rows each."""
    parts = []
    for placeholders in [*rows, 0]:
        parts.append(random_text(config, [config.image_token_index], generator))
        parts.append(torch.full((placeholders,), config.image_token_index))
    return torch.cat(parts)[None]
