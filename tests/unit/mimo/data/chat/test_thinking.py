"""Thoughts: as context, and with templates that forget them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.chat.spans import without_thinking
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record
from tests.unit.mimo.data.chats import with_template
from tests.unit.mimo.data.formats.templates import FORGETFUL_TEMPLATE


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain", ["plain"]),
        ("<think>a</think>\n\nb", ["b"]),
        ("a <think>b</think> c <think>d</think> e", ["a ", "c ", "e"]),
        ("begun before</think> b", ["b"]),
        ("a <think>never ended", ["a "]),
        ("<think>only</think>", []),
        ("<think>a</think>b</think>c", ["c"]),
    ],
)
def test_thoughts_are_taken_out_of_what_is_learned(text: str, left: list[str]) -> None:
    whole = f"<think>x</think>{text}<think>y</think>"
    start = len("<think>x</think>")
    spans = without_thinking(whole, (start, start + len(text)))
    assert [whole[first:end] for first, end in spans] == left


THOUGHTS = {
    "messages": [
        {"role": "user", "content": "1 and 1?"},
        {"role": "assistant", "content": "<think>one</think>2"},
        {"role": "user", "content": "2 and 3?"},
        {"role": "assistant", "content": "<think>two</think>5"},
    ]
}


def test_a_template_that_forgets_thoughts_teaches_the_last_answer() -> None:
    chat = with_template(FORGETFUL_TEMPLATE)

    def told(**options: Any) -> tuple[str, str]:
        record = RawRecord(value=THOUGHTS, file=Path("a.jsonl"), place="line 1")
        sample = chat.sample(read_record(record, ReadingOptions(**options)))
        decode = chat.processor.tokenizer.decode
        return decode(sample.token_ids), decode(sample.token_ids[sample.is_label])

    with pytest.raises(InputError, match=r"line 1, message 3: .*--learn last.*--thinking drop"):
        told()
    text, learned = told(learn="last")
    assert text == (
        "<s>user: 1 and 1?</s>assistant: 2</s>user: 2 and 3?</s>assistant: <think>two</think>5</s>"
    )
    assert learned == " <think>two</think>5</s>"
    assert told(learn="last", thinking="context")[1].strip() == "5</s>"
    assert told(thinking="drop")[1] == " 2</s> 5</s>"
