"""What an assistant takes from its model where nothing is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.mimo.data.conversation import Conversation
from megatron.mimo.inference import SamplingOptions
from megatron.mimo.inference.assistant import Assistant
from megatron.mimo.inference.rules import Rules

OWN = SamplingOptions(temperature=0.5, top_k=4, rules=Rules(repetition_penalty=1.1))


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, OWN),
        (SamplingOptions(seed=3), SamplingOptions(seed=3, rules=OWN.rules)),
        (SamplingOptions(rules=Rules()), SamplingOptions(rules=Rules())),
    ],
)
def test_the_models_own_options_and_rules(
    given: SamplingOptions | None, used: SamplingOptions
) -> None:
    def generate(prompts: list[str], options: SamplingOptions, **_: Any) -> list[list[int]]:
        assert options == used.ended_by((2, 3))
        return [[5] for _ in prompts]

    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(str, tokens)))
    chat = SimpleNamespace(
        processor=SimpleNamespace(tokenizer=tokenizer), prompt=lambda conversation: "asked"
    )
    assistant = Assistant(cast(Any, chat), cast(Any, generate), (2, 3), defaults=OWN)
    assert assistant([Conversation(name="a", turns=())], given) == ["5"]
