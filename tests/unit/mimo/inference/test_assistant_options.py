"""How an assistant's answers are sampled and ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.mimo.data.conversation import Conversation
from megatron.mimo.inference import SamplingOptions
from megatron.mimo.inference.assistant import Assistant


@pytest.mark.parametrize(
    ("options", "ended_by"),
    [
        (None, (2, 3)),
        (SamplingOptions(temperature=1.0), (2, 3)),
        (SamplingOptions(stop_tokens=(9,)), (9,)),
    ],
)
def test_the_models_own_stop_tokens_unless_there_are_others(
    options: SamplingOptions | None, ended_by: tuple[int, ...]
) -> None:
    def generate(prompts: list[str], options: SamplingOptions, **_: Any) -> list[list[int]]:
        assert tuple(options.stop_tokens) == ended_by
        return [[5] for _ in prompts]

    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(str, tokens)))
    chat = SimpleNamespace(
        processor=SimpleNamespace(tokenizer=tokenizer), prompt=lambda conversation: "asked"
    )
    assistant = Assistant(cast(Any, chat), cast(Any, generate), stop_tokens=[2, 3])
    assert assistant([Conversation(name="a", turns=())], options) == ["5"]
