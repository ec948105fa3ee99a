"""Records as data sets that people download have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record, tar_record

SPOKEN = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "7"}]
SAID = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "7"}]
ASKED = ["user: [d/a.jpg] what?", "assistant: 7"]
STORED = {"bytes": None, "path": "a.jpg"}
RATED = {
    **{f"{name}_ratings": [4] for name in ("relevance", "formatting", "image_correspondence")},
    **{f"{name}_min": 4 for name in ("relevance", "formatting", "visual_dependency")},
}

VARIANTS: dict[str, tuple[Any, list[str]]] = {
    "The Cauldron": (
        {"images": [STORED], "texts": [{"user": "what?", "assistant": "7", "source": "vqa"}]},
        ASKED,
    ),
    "FineVision": (
        {
            "images": ["a.jpg"],
            "texts": [{"user": "what?", "assistant": "7"}, {"user": "?", "assistant": "8"}],
            **RATED,
        },
        [*ASKED, "user: ?", "assistant: 8"],
    ),
    "InternVL": (
        {"image": ["a.jpg"], "width_list": [4], "height_list": [3], "conversations": SPOKEN},
        ASKED,
    ),
    "InternVL without a mark": (
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "what?"}, SPOKEN[1]]},
        ASKED,
    ),
    "MiniCPM-V": ({"image": "a.jpg", "conversations": SAID}, ASKED),
    "Qwen-VL": (
        {
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.jpg</img>\nwhat?"},
                {"from": "assistant", "value": "7"},
            ]
        },
        ["user: Picture 1:  [d/a.jpg] \nwhat?", "assistant: 7"],
    ),
    "turns as text": ({"image": "a.jpg", "conversations": json.dumps(SPOKEN)}, ASKED),
    "Gemma": (
        {"messages": [SAID[0], {"role": "model", "content": "7"}]},
        ["user: what?", ASKED[1]],
    ),
    "Dolly": (
        {"instruction": "what?", "context": "", "response": "7", "category": "qa"},
        ["user: what?", ASKED[1]],
    ),
    "prompt and response": ({"prompt": "what?", "response": "7"}, ["user: what?", ASKED[1]]),
    "VQAv2": (
        {
            "image": "a.jpg",
            "question": "what?",
            "answers": [{"answer": "7", "answer_confidence": "yes", "answer_id": 1}],
            "answer_type": "number",
        },
        ASKED,
    ),
    "VQAv2 with the most frequent answer": (
        {
            "image": "a.jpg",
            "question": "what?",
            "question_type": "what",
            "answers": [{"answer": "8", "answer_id": 1}, {"answer": "7", "answer_id": 2}],
            "multiple_choice_answer": "7",
            "question_id": 12,
        },
        ASKED,
    ),
    "ChartQA": (
        {"image": STORED, "query": "what?", "label": ["7"], "human_or_machine": 1},
        ASKED,
    ),
    "ChartQA's JSON": ({"imgname": "a.jpg", "query": "what?", "label": "7"}, ASKED),
    "MiniCPM-V with several images": (
        {
            "id": "0",
            "image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"},
            "conversations": [
                {"role": "user", "content": "<image_01>\nor <image_00>?"},
                {"role": "assistant", "content": "7"},
            ],
        },
        ["user: [d/b.jpg] or  [d/a.jpg] ?", "assistant: 7"],
    ),
    "MiniCPM-V without a mark": (
        {"image": {"<image>": "a.jpg"}, "conversations": SAID},
        ASKED,
    ),
    "Geometry3K": ({"images": ["a.jpg"], "problem": "<image>what?", "answer": "7"}, ASKED),
    "a folder of images": ({"file_name": "a.jpg", "text": "7"}, ["[d/a.jpg] 7"]),
    "Flickr30k": (
        {
            "image": STORED,
            "caption": ["7", "8"],
            "sentids": [0, 1],
            "split": "train",
            "img_id": "0",
            "filename": "a.jpg",
        },
        ["[d/a.jpg] 7"],
    ),
    "COCO of Karpathy": (
        {
            "image": STORED,
            "filepath": "train2014",
            "filename": "a.jpg",
            "sentids": [3],
            "imgid": 1,
            "cocoid": 2,
            "sentences": [{"raw": "7", "tokens": ["7"], "imgid": 1, "sentid": 3}],
        },
        ["[d/a.jpg] 7"],
    ),
    "a caption of COCO in a row": (
        {"image": STORED, "sentences": {"raw": "7", "tokens": ["7"]}},
        ["[d/a.jpg] 7"],
    ),
    "a path under its own name": ({"image_path": "a.jpg", "caption": "7"}, ["[d/a.jpg] 7"]),
    "a column that is null": ({"image": None, "img": "a.jpg", "caption": "7"}, ["[d/a.jpg] 7"]),
}


def told(found: Conversation | Document) -> list[str]:
    def text(parts: Any) -> str:
        return " ".join(part.value if part.kind == "text" else f"[{part.value}]" for part in parts)

    if isinstance(found, Document):
        return [text(found.content)]
    return [f"{turn.role}: {text(turn.content)}" for turn in found.turns]


def record(value: Any) -> RawRecord:
    return RawRecord(value=value, file=Path("d/a.jsonl"), place="line 7")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_people_have_is_read(name: str) -> None:
    value, expected = VARIANTS[name]
    assert told(read_record(record(value), ReadingOptions())) == expected


def test_two_names_of_one_kind_are_refused() -> None:
    for more in ({"img": "b.jpg"}, {"image": "b.jpg"}):
        with pytest.raises(InputError, match=r"\['image_path'\] would not|got the keys"):
            read_record(record({"image_path": "a.jpg", "caption": "7", **more}), ReadingOptions())


def test_paths_are_relative_to_the_folder_that_is_named() -> None:
    elsewhere = ReadingOptions(media_folder=Path("media"))
    value, _ = VARIANTS["MiniCPM-V"]
    assert told(read_record(record(value), elsewhere))[0] == "user: [media/a.jpg] what?"


def test_each_epoch_learns_the_next_caption() -> None:
    several = record({"image": "a.jpg", "captions": ["a cat", "a mat", "a hat"]})
    found = [
        told(read_record(replace(several, epoch=epoch), ReadingOptions())) for epoch in range(4)
    ]
    assert found == [[f"[d/a.jpg] a {what}"] for what in ("cat", "mat", "hat", "cat")]


def test_shards_of_img2dataset_are_captions() -> None:
    about = {
        "url": "http://x",
        "caption": "a cat",
        "key": "0",
        "status": "success",
        "exif": "{}",
        "error_message": None,
        "width": 4,
        "height": 3,
        "original_width": 40,
        "sha256": "ab",
        "pwatermark": 0.2,
    }
    members = {"jpg": b"J", "json": json.dumps(about).encode(), "txt": b"a cat"}
    found = read_record(tar_record("0", members, Path("d/s.tar")), ReadingOptions())
    assert told(found) == ["[0.jpg] a cat"]
    members["txt"] = b"a dog"
    with pytest.raises(InputError, match=r"has \['caption', 'text'\]"):
        read_record(tar_record("0", members, Path("d/s.tar")), ReadingOptions())


def test_turns_alone_in_a_tar_are_told_by_their_keys() -> None:
    for turns in (SPOKEN, [{"role": "user", "content": "<image>what?"}, SAID[1]]):
        members = {"jpg": b"J", "json": json.dumps(turns).encode()}
        found = read_record(tar_record("0", members, Path("d/s.tar")), ReadingOptions())
        assert told(found) == ["user: [0.jpg] what?", "assistant: 7"]
