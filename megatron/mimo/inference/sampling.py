"""From scores to the next token: greedy, temperature, nucleus. B sequences, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.inference.rules import Rules

__all__ = ["SamplingOptions", "choose_tokens", "draw_uniforms"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an answer is continued, and where it ends.

    Attributes:
        max_new_tokens: longest answer.
        temperature: divides the scores; 0 takes the most probable token.
        top_p: of the tokens, the most probable ones that together reach this probability.
        top_k: of the tokens, this many of the most probable; 0 for all.
        min_p: of the tokens, those that are at least so probable, as a part of the most probable
            one's probability; 0 for all.
        stop_tokens: ids that end an answer; they are left out of it.
        seed: of the draws. The same seed gives prompt i of a call the same answer, whatever the
            layout and the batch size.
        rules: what may be said, see ``Rules``; None for the rules of the model's own
            ``generation_config.json`` where an ``Assistant`` generates, and no others.

    Raises:
        ConfigError: a value out of its range; ``top_p``, ``top_k`` or ``min_p`` without a
            temperature.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_tokens: Sequence[int] = ()
    seed: int = 0
    rules: Rules | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1: all tokens)")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; expected 0 (all tokens) to 1")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k or self.min_p):
            also = f" (and min_p {self.min_p})" if self.min_p else ""
            raise ConfigError(
                f"top_p is {self.top_p} and top_k is {self.top_k}{also}, and temperature 0 always "
                "takes the most probable token; give a temperature as well, such as 1"
            )

    def ended_by(self, stop_tokens: Sequence[int]) -> SamplingOptions:
        """The same, with these stop tokens besides its own."""
        return replace(self, stop_tokens=(*self.stop_tokens, *stop_tokens))


def draw_uniforms(options: SamplingOptions, prompt: int) -> Tensor | None:
    """The draws of one prompt's answer: float64 [max_new_tokens] in [0, 1), on the host.

    Args:
        options: with the seed.
        prompt: its number in the call.

    Returns:
        None where nothing is drawn.
    """
    if options.temperature == 0:
        return None
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + prompt) % (1 << 63))
    return torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)


def choose_tokens(
    scores_BV: Tensor, options: SamplingOptions, uniforms_B: Tensor | None = None
) -> Tensor:
    """The next token of each sequence: int64 [B].

    A pure function: ranks with the same scores choose the same tokens.

    Args:
        scores_BV: logits, float32 or wider; -inf for tokens that may not be chosen.
        options: temperature, ``top_k``, ``top_p`` and ``min_p``, which narrow the choice in this
            order, each by the probabilities that those before it have left, as in transformers.
        uniforms_B: the draws in [0, 1), on the scores' device; None only for temperature 0.
    """
    if options.temperature == 0:
        return scores_BV.argmax(dim=-1)
    assert uniforms_B is not None, "a temperature wants draws"
    sorted_BV, tokens_BV = scores_BV.double().sort(dim=-1, descending=True, stable=True)
    chances_BV = torch.softmax(sorted_BV / options.temperature, dim=-1)
    kept_BV = torch.ones_like(chances_BV, dtype=torch.bool)
    if options.top_k:
        kept_BV[:, options.top_k :] = False
    chances_BV = chances_BV * kept_BV / (chances_BV * kept_BV).sum(dim=-1, keepdim=True)
    before_BV = chances_BV.cumsum(dim=-1) - chances_BV
    kept_BV &= before_BV < options.top_p
    kept_BV &= chances_BV >= options.min_p * chances_BV[:, :1]
    kept_BV[:, 0] = True
    mass_BV = (chances_BV * kept_BV).cumsum(dim=-1)
    wanted_B1 = uniforms_B[:, None] * mass_BV[:, -1:]
    place_B1 = (mass_BV <= wanted_B1).sum(dim=-1, keepdim=True)
    # Rounding may carry a draw next to 1 past the end.
    place_B1 = place_B1.minimum(kept_BV.sum(dim=-1, keepdim=True) - 1)
    return tokens_BV.gather(1, place_B1).squeeze(1)
