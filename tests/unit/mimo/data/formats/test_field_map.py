"""What Energon's field_map makes of a sample's members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats import ReadingOptions, field_map, read_record
from megatron.mimo.data.media.source import EncodedMedium

FILE = Path("prepared")
PICTURE = (Path(__file__).parents[5] / "examples/data/media/cat.png").read_bytes()


def read(described: dict[str, str], members: dict[str, bytes]) -> Conversation | Document:
    record = field_map(described, "dataset.yaml").record("00012", members, FILE)
    return read_record(record, ReadingOptions())


def test_questions_within_json_with_an_image_of_either_kind() -> None:
    described = {
        "image": "jpg,png",
        "context": "meta.json[talk][question]",
        "answers": "meta.json[talk][answers][0][text]",
    }
    talk = {"question": "What is it?", "answers": [{"text": "A cat."}, {"text": "Not this."}]}
    members = {"png": PICTURE, "meta.json": json.dumps({"talk": talk}).encode(), "npy": b"unread"}
    found = read(described, members)
    assert isinstance(found, Conversation)
    question, answer = found.turns
    image, text = question.content
    assert isinstance(image.value, EncodedMedium)
    assert image.value.data == PICTURE
    assert (text.value, answer.content[0].value) == ("What is it?", "A cat.")
    assert "key 00012" in found.name


def test_a_caption_under_another_name() -> None:
    found = read({"image": "png", "caption": "english.txt"}, {"png": PICTURE, "english.txt": b"Hi"})
    assert isinstance(found, Document)
    assert [part.kind for part in found.content] == ["image", "text"]
    assert found.content[1].value == "Hi"


@pytest.mark.parametrize(
    ("described", "members", "message"),
    [
        ({"image": "jpg"}, {"png": b""}, r"key 00012: no 'image', .* in jpg; .* \['png'\]"),
        ({"caption": "json[a][3]"}, {"json": b'{"a": [1]}'}, r"no 'caption', .* json\[a\]\[3\]"),
        ({"caption": "json[a]"}, {"json": b"{"}, "its json cannot be decoded"),
        ({"caption": "txt"}, {"txt": b"\xff"}, "its txt cannot be decoded"),
        ({"image": "npy"}, {"npy": b""}, "npy, which is neither JSON, text nor a medium"),
    ],
)
def test_what_is_not_there_is_named(
    described: dict[str, str], members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        field_map(described, "dataset.yaml").record("00012", members, FILE)


@pytest.mark.parametrize("described", [{}, "jpg", {"image": "jpg["}, {"image": 3}, {"image": ""}])
def test_maps_that_are_none_are_refused(described: Any) -> None:
    with pytest.raises(InputError, match=r"dataset.yaml: field_map (gives|is) "):
        field_map(described, "dataset.yaml")
