"""Random conversations that reach all of a model: every kind of medium, special tokens, long texts.

Legend: L tokens of one conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LONG", "Covered", "coverage", "covering_examples", "special_tokens", "text_limit"]

LONG = 512
"""Tokens of the longest conversation, where the model has so many positions."""

_TRIED = 64  # conversations that are drawn to find one with each kind of medium
_SPARE = 48  # positions that are left for an answer

Conversation = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Covered:
    """What a set of conversations holds, and what it lacks.

    Attributes:
        text: in words.
        missing: in words, one for each gap.
    """

    text: str
    missing: tuple[str, ...]


def covering_examples(family: Any, config: Any, *, samples: int, seed: int) -> list[Conversation]:
    """Conversations that hold every kind of medium; the last is long, with special tokens.

    Args:
        family: the model's.
        config: its configuration.
        samples: how many at least; more where the kinds of media need them.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = set(_placeholders(family, config).values())
    chosen: list[Any] = []
    for example in (family.example(config, generator) for _ in range(_TRIED)):
        new = wanted & set(example["input_ids"].flatten().tolist())
        wanted -= new
        if new or len(chosen) + bool(wanted) < samples:
            chosen.append(example)
        if not wanted and len(chosen) >= samples:
            break
    chosen[-1] = _longer(family, config, chosen[-1], generator)
    return chosen


def coverage(family: Any, config: Any, examples: Sequence[Conversation]) -> Covered:
    """Which kinds of media, special tokens and lengths conversations cover."""
    tokens = [token for one in examples for token in one["input_ids"].flatten().tolist()]
    missing, said = [], []
    for kind, token in _placeholders(family, config).items():
        count = tokens.count(token)
        said.append(f"{count} rows of {kind}")
        if not count:
            missing.append(f"no conversation holds {kind}")
    special = special_tokens(family, config)
    missing += [
        f"no text holds the {name} token, {token}"
        for name, token in special.items()
        if token not in tokens
    ]
    longest, limit = max(one["input_ids"].size(1) for one in examples), text_limit(config)
    if longest < limit:
        missing.append(f"the longest conversation has {longest} tokens, expected {limit}")
    said += [f"the {name} token" for name in special]
    return Covered(text=f"{', '.join(said)}; up to {longest} tokens", missing=tuple(missing))


def text_limit(config: Any) -> int:
    """Tokens that the longest conversation has, at least."""
    positions: int = config.get_text_config().max_position_embeddings
    return min(LONG, positions - _SPARE)


def special_tokens(family: Any, config: Any) -> dict[str, int]:
    """Padding, beginning and end of a text, by name, where they are tokens for themselves."""
    text, taken = config.get_text_config(), set(_placeholders(family, config).values())
    found: dict[str, int] = {}
    for name, field in (("padding", "pad"), ("first", "bos"), ("end", "eos")):
        given = getattr(text, f"{field}_token_id", None)
        for number, token in enumerate(given if isinstance(given, list) else [given]):
            if isinstance(token, int) and 0 <= token < text.vocab_size and token not in taken:
                found[name if not number else f"{name} ({number + 1})"] = token
    return found


def _placeholders(family: Any, config: Any) -> Mapping[str, int]:
    """Kind of medium -> its placeholder in conversations of Hugging Face's form."""
    if family.placeholders is not None:
        placeholders: Mapping[str, int] = family.placeholders(config)
        return placeholders
    tokens: Mapping[str, int] = family.media(config).special_token_ids
    return tokens


def _longer(
    family: Any, config: Any, example: Conversation, generator: torch.Generator
) -> Conversation:
    """The conversation with a text behind it, of random words and every special token."""
    tokens_1L, special = example["input_ids"], list(special_tokens(family, config).values())
    text = config.get_text_config()
    is_word_V = torch.ones(text.vocab_size, dtype=torch.bool)
    is_word_V[[token for token in (*_token_fields(config), *special) if token < len(is_word_V)]] = (
        False
    )
    words_V = is_word_V.nonzero().flatten()
    count = max(text_limit(config) - tokens_1L.size(1), 3 * len(special) + 1)
    tail_L = words_V[torch.randint(len(words_V), (count,), generator=generator)]
    for number, token in enumerate(special):  # none at the end, and none beside another
        tail_L[3 * number + 1] = token
    longer = dict(example)
    for name, value in example.items():
        if name == "input_ids":
            longer[name] = torch.cat([value, tail_L[None]], dim=1)
        elif value.shape == tokens_1L.shape:  # one number for each token, 0 for text
            longer[name] = torch.cat([value, value.new_zeros(1, count)], dim=1)
    return longer


def _token_fields(config: Any) -> Iterator[int]:
    """Every token that a configuration names."""
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 0:
            yield value
