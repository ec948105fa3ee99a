"""Which modules may draw random numbers, so that they do not encode ahead of their step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from megatron.core.models.mimo.model.encode_first.encode_ahead import draws


def configured(**settings: object) -> nn.Module:
    module = nn.Linear(1, 1)
    module.config = SimpleNamespace(**settings)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(1, 1), False),
        (nn.Dropout(0.0), False),
        (nn.Dropout(0.1), True),
        (configured(hidden_dropout=0.0, moe_token_drop_policy="probs", dropless=True), False),
        (configured(attention_dropout=0.1), True),
    ],
)
def test_draws(module: nn.Module, expected: bool) -> None:
    assert draws(nn.Sequential(nn.Identity(), module)) is expected
