"""Files of conversations: both formats read alike, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from tests.unit.mimo.data.chats import ReadFile

OURS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "path": "a.png"},
                {"type": "text", "text": "What is this, and that "},
                {"type": "image", "path": "/b.png"},
            ],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
}
LLAVA = {
    "id": "000",
    "image": ["a.png", "/b.png"],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is this, and that <image>"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}


def written(path: Path, *entries: Any) -> ReadFile:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return ReadFile(path)


def content(conversation: Conversation) -> list[Any]:
    return [
        (turn.role, [(part.kind, str(part.value)) for part in turn.content])
        for turn in conversation.turns
    ]


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    ours, llava = written(tmp_path / "both.jsonl", OURS, "", LLAVA)
    assert content(ours) == content(llava)
    assert content(ours)[1] == (
        "user",
        [
            ("image", str(tmp_path / "a.png")),
            ("text", "What is this, and that "),
            ("image", "/b.png"),
        ],
    )
    assert [part.value for part in ours.turns[-1].content] == ["Yes."]
    assert llava.name == f"{tmp_path}/both.jsonl, line 3"  # blank lines are counted


def test_a_list_reads_like_lines(tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([LLAVA, OURS]))
    file = ReadFile(listed)
    assert len(file) == 2
    assert content(file[1]) == content(file[0])
    assert file[1].name == f"{listed}, entry 2"


def changed(**changes: Any) -> dict[str, Any]:
    return {**LLAVA, **changes}


ASK = {"role": "user", "content": "?"}
TELL = {"role": "assistant", "content": "!"}
BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"messages": [', r"line 2: not valid JSON: Expecting value at character 15"),
    "a list": ([], r"line 2: expected an object, got list"),
    "no turns": (
        {"txt": "a"},
        r"neither 'messages' nor 'conversations' nor .*; got the keys \['txt'\]",
    ),
    "media beside messages": (
        {**OURS, "image": "a.png"},
        r"line 2: \['image'\] would not be read; ",
    ),
    "plural": (
        changed(images=["a.png"]),
        r"\['images'\] would not be read.* names its media in one way",
    ),
    "unanswered": ({"messages": [ASK]}, r"line 2: the last turn is not the assistant's"),
    "empty": ({"messages": []}, r"'messages' is \[\]; expected a list of turns"),
    "role": (
        {"messages": [{"role": "robot", "content": "a"}, TELL]},
        r"line 2, message 0: expected an object with a role \(system, user, assistant, tool\)",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "smell", "path": "a"}]}, TELL]},
        r'line 2, message 0: cannot read {"type": "smell"',
    ),
    "no path": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, TELL]},
        r'the image has no "path" to a file; got \[\'type\'\]',
    ),
    "address": (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "http://a"}]}, TELL]},
        r"image http://a is on the network; download it",
    ),
    "answer with media": (
        {"messages": [ASK, {"role": "assistant", "content": [{"type": "image", "path": "a"}]}]},
        r"message 1: the assistant's turn holds \['image'\]",
    ),
    "image without place": (changed(image=["a", "b", "c"]), r"no turn has a place for .*'image'"),
    "place without image": (changed(image="a"), r"line 2, message 1: <image> without a file"),
    "speaker": (
        changed(image=None, conversations=[{"from": "cat", "value": "a"}]),
        r"line 2, message 0: expected an object with from",
    ),
}


@pytest.mark.parametrize(("entry", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    file = written(tmp_path / "bad.jsonl", OURS, entry)
    assert len(file[0].turns) == 5
    with pytest.raises(InputError, match=message) as caught:
        file[1]
    assert str(tmp_path) in str(caught.value)
