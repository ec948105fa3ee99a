"""Keys are honoured, refused by name with file and line, or known to mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from tests.unit.mimo.data.chats import ReadFile

IMAGE = {"type": "image", "path": "a.png"}
VIDEO = {"type": "video", "path": "a.gif"}


def entry(part: dict[str, Any] | None = None, turn: Any = None, **more: Any) -> dict[str, Any]:
    content = [*([part] if part else []), {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "It.", **(turn or {})}
    return {"messages": [{"role": "user", "content": content}, answer], **more}


SPOKEN = {"from": "gpt", "value": "Salut"}


def llava(turn: Any = None, **more: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "Hi"}, {**SPOKEN, **(turn or {})}]
    return {"conversations": talk, **more}


def read(tmp_path: Path, line: Any, **options: Any) -> Any:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return ReadFile(path, **options)[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rejected_response": (entry(rejected_response="no"), "preferences are not trained on"),
    "rejected": (llava(rejected="no"), "preferences"),
    "weight": (entry(weight=0.5), "say it in the turn"),
    "functions": (entry(functions=[{"name": "a"}]), "give functions as tools"),
    "thinking": (entry(turn={"thinking": "hm"}), "as reasoning_content"),
    "min_pixels": (entry({**IMAGE, "min_pixels": 4}), "preprocessor_config.json"),
    "max_pixels": (entry({**IMAGE, "max_pixels": 4}), "preprocessor_config.json"),
    "resized_height": (entry({**IMAGE, "resized_height": 8}), "preprocessor_config.json"),
    "total_pixels": (entry({**VIDEO, "total_pixels": 8}), "preprocessor_config.json"),
    "fps": (entry({**IMAGE, "fps": 2}), "a video takes fps"),
    "reasoning_content": (llava({"reasoning_content": "hm"}), "rename or delete it"),
    "tool_calls": (llava({"tool_calls": [1]}), "rename or delete it"),
    "difficulty": (entry(difficulty="hard"), "rename or delete it"),
    "txet": (entry({"type": "text", "text": "a", "txet": "b"}), "rename or delete it"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_honoured_is_refused_with_its_line(tmp_path: Path, key: str) -> None:
    line, remedy = REFUSED[key]
    with pytest.raises(InputError, match=rf"a.jsonl, line 1.*'{key}'.* would not be read") as told:
        read(tmp_path, line)
    assert remedy in str(told.value)
    assert f"--ignore-keys {key}" in str(told.value)
    assert read(tmp_path, line, ignored=frozenset([key])).turns  # the user's own decision


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "half": (entry(turn={"weight": 0.5}), r"message 1: 'weight' is 0.5; .* nothing between"),
    "twice": (entry(turn={"weight": 1, "loss": False}), r"contradict each other"),
    "nothing learned": (entry(turn={"loss": False}), r"no turn of the assistant's is learned"),
    "user learned": (
        {"messages": [{"role": "user", "content": "a", "train": True}, *entry()["messages"]]},
        r"message 0: .* of a turn of the user; only what the assistant says",
    ),
    "system twice": (
        {"messages": [{"role": "system", "content": "a"}, *entry()["messages"]], "system": "b"},
        r"has 'system' and a first turn of the system",
    ),
    "system": (entry(system=["a"]), r"'system' is \[\"a\"\]; expected text"),
    "tools": (entry(tools="[1"), r"'tools' is text that is not JSON"),
    "no tools": (entry(tools=[1]), r"'tools' is \[1\]; expected a list of objects"),
    "both formats": ({**entry(), **llava()}, r"has \['messages', 'conversations'\], and one"),
    "both paths": (entry({**IMAGE, "image": "b.png"}), r'"path" and "image", which differ'),
    "rate": (entry({**VIDEO, "fps": 0}), r"'fps' is 0; expected a number of frames per second"),
    "rate beyond": (entry({**VIDEO, "fps": 10**400}), r"'fps' is 10+; expected a number"),
    "rate of nothing": (entry({**VIDEO, "fps": float("nan")}), r"'fps' is NaN; expected a number"),
    "long path": (
        {
            "image": ["b", "a" * 5000],
            "conversations": [{"from": "human", "value": "<image>"}, SPOKEN],
        },
        r"no turn has a place for {'image': .*aaa\.\.\.aaa",
    ),
    "rate as text": (entry({**VIDEO, "fps": "2"}), r"'fps' is \"2\"; expected a number"),
    "frames": (entry({**VIDEO, "nframes": 2.5}), r"'nframes' is 2.5; expected a number of frames"),
    "rate and frames": (entry({**VIDEO, "nframes": 2, "fps": 1}), r"exclude each other"),
    "backwards": (entry({**VIDEO, "video_start": 2, "video_end": 1}), r"starts at 2 s and ends at"),
    "gpt first": (
        {"conversations": [{"from": "gpt", "value": "Hello"}, *llava()["conversations"]]},
        r"line 1: begins with the assistant.*; delete that turn",
    ),
    "speaker": (
        {"conversations": [{"from": {"a": 1}, "value": "a"}]},
        r"line 1, message 0: expected an object with from",
    ),
    "role": ({"messages": [{"role": ["a"], "content": "a"}]}, r"line 1, message 0: expected an"),
    "type": (entry({"type": ["image"], "path": "a"}), r"line 1, message 0: cannot read"),
    "type is a dict": (entry({"type": {}, "path": "a"}), r"line 1, message 0: cannot read"),
    "no path": (entry({"type": "image", "path": " "}), r"image ' ' is no path"),
    "data": (
        entry({"type": "image", "image": "data:image/png;base64," + "QUJ!" * 999}),
        r"image data:image/png;base64 is not valid base64: .*; encode the file again",
    ),
    "bucket": (entry({"type": "image", "path": "s3://a/b.png"}), r"s3://a/b.png is on the network"),
}


@pytest.mark.parametrize(("line", "message"), VALUES.values(), ids=VALUES)
def test_values_without_sense_are_refused(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        read(tmp_path, line)
    assert f"{tmp_path}/a.jsonl, line 1" in str(told.value)
    assert len(str(told.value)) < 500


def test_keys_that_say_nothing_pass(tmp_path: Path) -> None:
    told = read(tmp_path, llava(id=3, source="web", width=4, rejected=None, tools=[]))
    assert [turn.role for turn in told.turns] == ["user", "assistant"]
    part = {**IMAGE, "text": None, "fps": None}
    assert read(tmp_path, entry(part, {"tool_calls": [], "weight": 1}, id="a")).turns[1].is_learned


def test_system_and_settings_are_kept(tmp_path: Path) -> None:
    told = read(tmp_path, llava(system="Answer in French."))
    assert [turn.role for turn in told.turns] == ["system", "user", "assistant"]
    assert told.turns[0].content[0].value == "Answer in French."
    settings = {"fps": 0.5, "video_start": 1, "video_end": 2.5}
    assert read(tmp_path, entry({**VIDEO, **settings})).turns[0].content[0].settings == settings
    frames = (
        read(tmp_path, entry({"type": "video", "video": ["b.png", "a.png"]})).turns[0].content[0]
    )
    assert frames.value == (tmp_path / "b.png", tmp_path / "a.png")
