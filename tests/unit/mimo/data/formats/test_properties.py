"""Properties that hold for all records: what one format says the others say too, and anything that
is no record is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats import FORMATS, RawRecord, ReadingOptions, read_record

bounded = settings(max_examples=80, deadline=None, derandomize=True, database=None)

# Text without marks for media, objects, or thoughts, and with something to say in it.
words = st.text(st.characters(codec="utf-8", exclude_characters="<>\0"), min_size=1, max_size=12)
words = words.filter(str.strip)
pictures = st.lists(st.from_regex(r"[a-z]{1,5}\.png", fullmatch=True), max_size=3)
rounds = st.lists(st.tuples(pictures, words, words), min_size=1, max_size=4)


def read(value: Any, **options: Any) -> Conversation | Document:
    record = RawRecord(value=value, file=Path("d/a.jsonl"), place="line 1")
    return read_record(record, ReadingOptions(**options))


def told(conversation: Any) -> list[Any]:
    return [
        (turn.role, turn.is_learned, [(part.kind, str(part.value)) for part in turn.content])
        for turn in conversation.turns
    ]


def in_parts(talk: list[Any]) -> dict[str, Any]:
    messages = []
    for names, question, answer in talk:
        parts = [{"type": "image", "path": name} for name in names]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def with_marks(talk: list[Any]) -> tuple[list[tuple[str, str]], list[str]]:
    pairs = [("<image>" * len(names) + question, answer) for names, question, answer in talk]
    return pairs, [name for names, _, _ in talk for name in names]


@bounded
@given(rounds, words)
def test_formats_that_say_the_same_give_the_same_turns(talk: list[Any], system: str) -> None:
    pairs, images = with_marks(talk)
    lead = [{"role": "system", "content": system}]
    marked = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    spoken = [
        {"from": role, "value": text}
        for pair in pairs
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    last = {"history": [list(pair) for pair in pairs[:-1]], "images": images, "system": system}
    expected = told(read({**in_parts(talk), "system": system}))
    # a line break beside a mark goes with it
    if any(names and question.startswith("\n") for names, question, _ in talk):
        return
    assert told(read({"messages": [*lead, *marked], "images": images})) == expected
    assert told(read({"conversations": spoken, "images": images, "system": system})) == expected
    if images:
        assert told(read({"conversations": spoken, "image": images, "system": system})) == expected
    assert told(read({"query": pairs[-1][0], "response": pairs[-1][1], **last})) == expected
    asked = {"instruction": pairs[-1][0], "output": pairs[-1][1]}
    assert told(read({**asked, **last})) == expected


@bounded
@given(rounds, st.data())
def test_flags_and_options_choose_what_is_learned(talk: list[Any], data: st.DataObject) -> None:
    record = in_parts(talk)
    flags = data.draw(st.lists(st.booleans(), min_size=len(talk), max_size=len(talk)))
    flags[-1] = True
    for turn, flag in zip(record["messages"][1::2], flags, strict=True):
        turn[data.draw(st.sampled_from(["weight", "loss", "train"]))] = flag
    learned = [turn.is_learned for turn in read(record).turns[1::2]]  # type: ignore[union-attr]
    assert learned == flags
    last = [turn.is_learned for turn in read(record, learn="last").turns[1::2]]  # type: ignore[union-attr]
    assert last == [False] * (len(talk) - 1) + [True]


@bounded
@given(words, words, words)
def test_thoughts_are_kept_or_left_out(before: str, thought: str, answer: str) -> None:
    text = f"<think>{thought}</think>\n\n{answer}"
    record = {
        "messages": [{"role": "user", "content": before}, {"role": "assistant", "content": text}]
    }
    for thinking, expected in (("keep", text), ("context", text), ("drop", answer.lstrip())):
        turn = read(record, thinking=thinking).turns[-1]  # type: ignore[union-attr]
        assert turn.content[0].value == expected
        assert turn.learns_thinking == (thinking != "context")


keys = st.sampled_from(
    [
        *(
            "messages",
            "conversations",
            "conversation",
            "images",
            "image",
            "videos",
            "audio",
            "text",
        ),
        *("role", "content", "from", "value", "type", "path", "prompt", "completion", "query"),
        *(
            "response",
            "instruction",
            "input",
            "output",
            "system",
            "tools",
            "objects",
            "bbox",
            "ref",
        ),
        *("texts", "text_list", "image_info", "sequence", "question", "answers", "history", "url"),
        *("caption", "tool_calls", "weight", "bytes", "image_url", "human", "assistant", "user"),
    ]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@settings(bounded, max_examples=300)
@given(st.dictionaries(keys, json_values, max_size=5), st.sampled_from([None, *FORMATS]))
def test_whatever_a_record_holds_is_read_or_refused_by_name(value: Any, format_: Any) -> None:
    refusal = ""
    try:
        found = read(value, data_format=None if format_ is None else format_.name)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("d/a.jsonl, line 1")
        assert len(refusal) < 1000
    else:
        assert found.name == "d/a.jsonl, line 1"
        json.dumps([str(part.value) for part in found.media])
