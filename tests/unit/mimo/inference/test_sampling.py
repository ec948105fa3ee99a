"""What is drawn, against counting and by hand. B sequences, V vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.inference import SamplingOptions
from megatron.mimo.inference.sampling import choose_tokens, draw_uniforms

CHANCES = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
EVEN = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


def frequencies(**given: Any) -> list[float]:
    scores_BV = CHANCES.log().expand(len(EVEN), -1)
    tokens_B = choose_tokens(scores_BV, SamplingOptions(**given), EVEN)
    return (tokens_B.bincount(minlength=5) / len(EVEN)).tolist()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.0, 0.3, 0.2]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.0, 0.09 / 0.3, 0.04 / 0.3]),
        ({"temperature": 1.0, "top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.0, 4 / 9, 0.0, 3 / 9, 2 / 9]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.0, 0.3, 0.2]),
    ],
)
def test_frequencies_are_the_probabilities(given: dict[str, Any], expected: list[float]) -> None:
    assert frequencies(**given) == pytest.approx(expected, abs=2e-3)


def test_the_largest_draw_is_not_past_the_end() -> None:
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    options = SamplingOptions(temperature=1.0, top_k=2)
    assert choose_tokens(CHANCES.log()[None], options, nearly_one).tolist() == [3]


def test_a_token_that_reaches_the_probability_alone_is_enough() -> None:
    options = SamplingOptions(temperature=1.0, top_p=0.5)
    late = torch.tensor([0.9], dtype=torch.float64)
    assert choose_tokens(torch.zeros(1, 2), options, late).tolist() == [0]


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose_tokens(torch.tensor([[1.0, 3.0, 3.0]]), SamplingOptions()).tolist() == [1]


def test_draws_depend_on_seed_and_prompt_only() -> None:
    def draws(seed: int, prompt: int, length: int = 4) -> list[float]:
        options = SamplingOptions(temperature=1.0, seed=seed, max_new_tokens=length)
        drawn = draw_uniforms(options, prompt)
        assert drawn is not None
        return drawn.tolist()

    assert draws(1, 2) == draws(1, 2)
    assert draws(1, 2) != draws(1, 3)
    assert draws(1, 2) != draws(2, 2)
    assert draws(1, 2, 6)[:4] == draws(1, 2)
    assert draw_uniforms(SamplingOptions(), 0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1; expected 0"),
        ({"top_p": 0.5}, "top_p is 0.5 .* temperature 0 .*; give a temperature"),
        ({"top_k": 2}, "top_k is 2, and temperature 0"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingOptions(**given)
