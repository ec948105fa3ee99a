"""What is wrong with a record of each format is named with its place and a remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.formats import (
    FORMATS,
    RawRecord,
    ReadingOptions,
    detect,
    read_record,
    tar_record,
)

ASK, TELL = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
CHAT = [ASK, TELL]
SPOKEN = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
NUMBERED = [{"from": "human", "value": "<image_01>?"}, SPOKEN[1]]
SEEN = [{"role": "user", "content": "<image>?"}, TELL]
PAGE = (Path(__file__).parents[5] / "docs/data.md").read_text()


def record(value: Any, **members: bytes) -> RawRecord:
    return RawRecord(value=value, file=Path("d/a.jsonl"), place="line 7", members=members)


def part(value: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [value]}, TELL]}


MALFORMED: dict[str, tuple[Any, str]] = {
    # messages
    "url": (part({"type": "image_url", "image_url": {"uri": "a"}}), r"\['uri'\] would not be read"),
    "url of a number": (part({"type": "image_url", "image_url": 3}), r"image_url is 3; expected"),
    "detail": (
        part({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        r"\['detail'\] would not be read.*the processor sizes all media",
    ),
    "network": (
        part({"type": "image_url", "image_url": {"url": "https://x/a.png"}}),
        r"message 0: image https://x/a.png is on the network; download it",
    ),
    "sound": (part({"type": "input_audio", "input_audio": {}}), r"the input_audio is {}; expected"),
    "decoded": (
        part({"type": "audio", "audio": {"array": [0.0], "sampling_rate": 8}}),
        r"the audio is decoded already; store it undecoded",
    ),
    "bytes": (
        part({"type": "image", "image": {"bytes": "abc"}}),
        r"bytes of the image are \"abc\"",
    ),
    "stored": (part({"type": "image", "image": {"data": "abc"}}), r"an object with \['data'\]"),
    "calls": ({"messages": [ASK, {**TELL, "tool_calls": "x"}]}, r"'tool_calls' is \"x\""),
    "arguments": (
        {
            "messages": [
                ASK,
                {**TELL, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ]
        },
        r"message 1: the arguments of \"f\" are text that is not JSON",
    ),
    "tool_call": (
        {"messages": [ASK, {"role": "tool_call", "content": "f(x)"}]},
        r"message 1: a call of a tool is not valid JSON",
    ),
    # marked-messages
    "too few": (
        {"messages": SEEN, "images": []},
        r"<image> without a file; 'images' names too few",
    ),
    "more marks": (
        {"messages": [{**ASK, "content": "<image><image>"}, TELL], "images": ["a"]},
        r"message 0: <image> without a file; 'images' names too few",
    ),
    "more media": ({"messages": SEEN, "images": ["a", "b"]}, r"no turn has a place for {'image'"),
    "two ways": (
        {**part({"type": "image", "path": "a"}), "images": ["b"]},
        r"\['images'\] would not be read; its messages name their media themselves",
    ),
    "no question": (
        {"messages": [{"role": "system", "content": "x"}, TELL], "images": ["a"]},
        r"has media and no turn of the user",
    ),
    "media of numbers": ({"messages": SEEN, "images": [3]}, r"'images' is \[3\]; expected a path"),
    # llava, sharegpt
    "speaker": (
        {"conversations": [{"from": "cat", "value": "?"}]},
        r"expected an object with from",
    ),
    "pair": ({"conversation": [{"human": "?"}]}, r"expected an object with human and assistant"),
    "function call": (
        {"conversations": [SPOKEN[0], {"from": "function_call", "value": "f"}]},
        r"message 1: a call of a tool is not valid JSON",
    ),
    "nameless call": (
        {"conversations": [SPOKEN[0], {"from": "function_call", "value": "[1]"}]},
        r"message 1: a call of a tool is 1; expected",
    ),
    "two formats": ({"messages": CHAT, "conversations": SPOKEN}, r"has \['messages', 'conv.*keep"),
    # alpaca
    "no instruction": (
        {"instruction": " ", "output": "a"},
        r"'instruction' is \" \"; expected text",
    ),
    "output": ({"instruction": "a", "output": ["b"]}, r"'output' is \[\"b\"\]; expected text"),
    "history": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        r"'history' is \[\"c\"\]; expected a list of \[question, answer\]",
    ),
    "chosen": ({"instruction": "a", "output": "b", "chosen": "c"}, r"preferences are not trained"),
    # swift
    "rejected": (
        {"query": "a", "response": "b", "rejected_response": "c"},
        r"\['rejected_response'\] would not be read.*preferences are not trained on",
    ),
    "label": ({"messages": CHAT, "label": True}, r"\['label'\] would not be read.*preferences"),
    "objects": ({"messages": CHAT, "objects": [1]}, r"'objects' is \[1\]; expected ref and bbox"),
    "object keys": ({"messages": CHAT, "objects": {"box": [1]}}, r"objects: \['box'\] would not"),
    "object left": (
        {"messages": CHAT, "objects": {"ref": ["a"]}},
        r"no text has <ref-object> for \[\"a\"\]",
    ),
    "no object": (
        {"messages": [{**ASK, "content": "<bbox>"}, TELL], "objects": {"ref": ["a"]}},
        r"<bbox> without an object; 'objects' has too few",
    ),
    "box": (
        {"messages": [{**ASK, "content": "<bbox>"}, TELL], "objects": {"bbox": [[1, 2, 3]]}},
        r"a bbox is \[1, 2, 3\]; expected \[x1, y1, x2, y2\]",
    ),
    "boxes": ({"messages": CHAT, "objects": {"bbox": 1.5}}, r"'bbox' is 1.5; expected a list"),
    "box type": (
        {"messages": CHAT, "objects": {"bbox": [], "bbox_type": "norm2"}},
        r"'bbox_type' is \"norm2\"; expected one of real, norm1, norm1000",
    ),
    # prompt-completion
    "halves": ({"prompt": "a", "completion": CHAT}, r"'prompt' is str and 'completion' list"),
    "empty": ({"prompt": "a", "completion": ""}, r"'completion' is \"\"; expected text"),
    # visual-questions
    "two questions": ({"question": "a", "context": "b", "answer": "c"}, r"has \['question', 'con"),
    "answers": ({"question": "a", "answers": []}, r"'answer' is null|'answers' is \[\]"),
    "weights": (
        {"question": "a", "answers": ["b"], "answer_weights": [1, 2]},
        r"'answer_weights' is \[1, 2\]; expected a number for each of 1 answers",
    ),
    "weights of one": (
        {"question": "a", "answer": "b", "answer_weights": [1, 2]},
        r"'answer_weights' is \[1, 2\]; expected a number for each of 1 answers",
    ),
    "no answer": ({"question": "a", "answers": ["", "b"]}, r"'answers' is \"\"; expected text"),
    "two beside": (
        {"question": "a", "answer": "b", "multiple_choice_answer": "c"},
        r"has \['answer', 'multiple_choice_answer'\], and one of them would not be read",
    ),
    "chart and question": (
        {"query": "a", "question": "b", "label": ["c"]},
        r"\['question'\] would not be read",
    ),
    "class": ({"query": "a", "label": 1}, r"'label' is 1; expected text or a list"),
    "image without a name": (
        {"image": {"<image_00>": "a"}, "conversations": NUMBERED},
        r"<image_01> without a file; 'image' has \[\"<image_00>\"\]",
    ),
    "marks in no text": (
        {"image": {"<image_00>": "a"}, "conversations": [{"from": "human", "value": 5}]},
        r"message 0: expected an object with from .* got \{\"from\": \"human\", \"value\": 5\}",
    ),
    "image without a mark": (
        {"image": {"<image_01>": "a", "<image_02>": "b"}, "conversations": NUMBERED},
        r"no turn has a place for \{'image': \['.*b'\]\}",
    ),
    "two answers": (
        {"question": "?", "answer": "a", "answers": ["b"]},
        r"has \['answer', 'answers'",
    ),
    "two outputs": ({"instruction": "?", "output": "a", "response": "b"}, r"one of them would not"),
    # exchanges
    "exchange": ({"texts": [{"user": "?"}]}, r"text 0: expected an object with user and assistant"),
    "quality": ({"texts": [{"user": "?", "assistant": "!", "a": 1}]}, r"text 0: \['a'\] would not"),
    # captions, text, interleaved
    "two captions": ({"image": "a", "caption": "b", "text": "c"}, r"has \['caption', 'text'\]"),
    "a caption of several": (
        {"image": "a", "captions": ["b", 7]},
        r"'captions' is 7; expected text",
    ),
    "no caption": ({"image": "a", "captions": []}, r"'caption' is null; expected text"),
    "an unknown key": (
        {"image": "a", "sentences": [{"raw": "b", "c": 1}]},
        r"\['c'\] would not be read",
    ),
    "blank": ({"text": " "}, r"'text' is \" \"; expected text"),
    "title": ({"text": "a", "title": "b"}, r"\['title'\] would not be read"),
    "places": ({"texts": ["a"], "images": []}, r"'images' is \[\]; expected a list"),
    "lengths": ({"texts": ["a", None], "images": [None]}, r"2 texts and 1 images"),
    "both": (
        {"texts": ["a"], "images": ["b"]},
        r"place 0: text \"a\" and image \"b\"; expected one",
    ),
    "matched": (
        {"text_list": ["a"], "image_info": [{"image_name": "b", "matched_text_index": 1}]},
        r"image 0: 'matched_text_index' is 1; expected 0 to 0",
    ),
    "places of images": (
        {"text_list": ["a"], "image_info": True},
        r"'image_info' is true; expected a list",
    ),
    "no text": ({"texts": [None], "images": ["a"]}, r"has no text; there is nothing to learn"),
    "sequence": ({"sequence": [3]}, r"cannot read 3; expected"),
    # none
    "no format": ({"a": 1}, r"nor the keys of another format; got the keys \['a'\]"),
    "no object at all": ([1], r"expected an object, got list"),
}


@pytest.mark.parametrize(("value", "message"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_wrong_is_named(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        read_record(record(value), ReadingOptions())
    assert str(told.value).startswith("d/a.jsonl, line 7")
    assert len(str(told.value)) < 500


def test_a_format_that_is_insisted_on_reads_or_refuses() -> None:
    both = record({"messages": CHAT, "text": "a"})
    with pytest.raises(InputError, match=r"\['text'\] would not be read"):
        read_record(both, ReadingOptions())
    with pytest.raises(InputError, match=r"\['messages'\] would not be read"):
        read_record(both, ReadingOptions(data_format="text"))
    kept = ReadingOptions(data_format="text", ignored=frozenset(["messages"]))
    assert read_record(both, kept).name == "d/a.jsonl, line 7"
    for one in FORMATS:
        with pytest.raises(InputError, match=r"^d/a.jsonl, line 7"):
            one.read(record({"nothing": "known"}), ReadingOptions())
    with pytest.raises(ConfigError, match=r"--data-format xml: there is no such format; .* llava"):
        detect(both, "xml")
    for changes in ({"learn": "first"}, {"thinking": "some"}):
        with pytest.raises(ConfigError, match=f"--{next(iter(changes))} is '"):
            ReadingOptions(**changes)


def test_members_of_a_tar_have_a_place_or_are_refused() -> None:
    tar = Path("d/s.tar")
    asked = [{"from": "human", "value": "<image>?"}, SPOKEN[1]]
    chat = json.dumps({"conversations": asked}).encode()
    found = read_record(tar_record("k", {"json": chat, "jpg": b"J"}, tar), ReadingOptions())
    [medium] = found.media
    assert (medium.value.data, medium.value.name) == (b"J", "k.jpg")
    named = b'{"image": "k.2.jpg", "caption": "two"}'
    group = {"json": named, "1.jpg": b"1", "2.jpg": b"2"}
    with pytest.raises(InputError, match=r"^d/s.tar, key k: \['1.jpg'\] lie beside .*ignore-keys"):
        read_record(tar_record("k", group, tar), ReadingOptions())
    one = read_record(tar_record("k", group, tar), ReadingOptions(ignored=frozenset(["1.jpg"])))
    assert [part.value.data for part in one.media] == [b"2"]
    with pytest.raises(InputError, match=r"\['npy'\] lie beside"):
        read_record(tar_record("k", {"txt": b"a", "npy": b"", "jpg": b"J"}, tar), ReadingOptions())
    with pytest.raises(InputError, match=r"^d/s.tar, key k: k.json is not valid JSON"):
        tar_record("k", {"json": b"{"}, tar)
    with pytest.raises(InputError, match=r"^d/s.tar, key k: k.txt is not UTF-8"):
        tar_record("k", {"txt": b"\xff"}, tar)


def test_the_documentation_names_every_format() -> None:
    for one in FORMATS:
        assert f"`{one.name}`" in PAGE, f"docs/data.md does not name {one.name}"


def test_the_format_of_the_documentation_reads_the_record_beside_it() -> None:
    [code] = re.findall(r"```python\n(\"{3}.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    asked = record(json.loads(names["__doc__"].splitlines()[2]))
    assert names["ASKED"].recognises(asked)
    question, answer = names["ASKED"].read(asked, ReadingOptions()).turns
    assert [part.kind for part in question.content] == ["image", "text"]
    assert (answer.content[0].value, answer.is_learned) == ("A cat.", True)
    with pytest.raises(InputError, match=r"\['mood'\] would not be read"):
        names["ASKED"].read(record({**asked.value, "mood": "good"}), ReadingOptions())
