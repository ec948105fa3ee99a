"""Rules on the next token, given the tokens before it, as ``generation_config.json`` has them.

Free functions from scores to scores, in the order in which transformers applies its own.
Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["Rules", "apply_rules"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Changes of the scores before a token is chosen; each default changes nothing.

    Attributes:
        repetition_penalty: divides the positive scores of tokens that stand in the prompt or the
            answer, and multiplies the negative ones.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 for no such rule.
        bad_words: sequences of tokens that do not occur.
        suppress_tokens: tokens that do not occur.
        begin_suppress_tokens: tokens with which no answer begins.
        min_new_tokens: of an answer, before its stop tokens may come.

    Raises:
        ConfigError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; expected more than 0 (1: none)"
            )
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")
        if any(not words for words in self.bad_words):
            raise ConfigError("bad_words has an empty entry; expected tokens in each")


def apply_rules(
    scores_BV: Tensor,
    rules: Rules,
    *,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    stop_tokens: Sequence[int] = (),
) -> Tensor:
    """The scores of the next tokens, -inf for those that may not be said.

    Args:
        scores_BV: as the model gives them.
        rules: of the answer.
        prompts: tokens of each sequence's prompt, without padding.
        answers: tokens of each answer so far.
        stop_tokens: that end an answer.
    """
    if rules == Rules():
        return scores_BV
    scores_BV = scores_BV.clone()
    for row_V, prompt, answer in zip(scores_BV, prompts, answers, strict=True):
        history = [*prompt, *answer]
        if rules.repetition_penalty != 1:
            _penalise(row_V, sorted(set(history)), rules.repetition_penalty)
        banned = _repeats(history, rules.no_repeat_ngram_size)
        banned += _ends_of_bad_words(history, rules.bad_words, stop_tokens)
        if len(answer) < rules.min_new_tokens:
            banned += stop_tokens
        banned += rules.suppress_tokens
        if not answer:
            banned += rules.begin_suppress_tokens
        known = [token for token in banned if 0 <= token < len(row_V)]
        if known:
            row_V[torch.tensor(known, device=row_V.device)] = -math.inf
    return scores_BV


def _penalise(row_V: Tensor, tokens: list[int], penalty: float) -> None:
    index = torch.tensor([token for token in tokens if token < len(row_V)], device=row_V.device)
    scores = row_V[index]
    row_V[index] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _repeats(history: list[int], size: int) -> list[int]:
    """Tokens that would complete a sequence of ``size`` tokens a second time."""
    if size == 0 or len(history) < size:
        return []
    start = history[len(history) - size + 1 :]
    return [
        history[place + size - 1]
        for place in range(len(history) - size + 1)
        if history[place : place + size - 1] == start
    ]


def _ends_of_bad_words(
    history: list[int], bad_words: Sequence[Sequence[int]], stop_tokens: Sequence[int]
) -> list[int]:
    """Last tokens of bad words whose other tokens have just been said.

    A stop token alone is none, as in transformers.
    """
    return [
        words[-1]
        for words in bad_words
        if not (len(words) == 1 and words[0] in stop_tokens)
        and (len(words) == 1 or history[-len(words) + 1 :] == list(words[:-1]))
    ]
