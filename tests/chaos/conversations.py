"""Malformed files of conversations, read as training reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from PIL import Image

from tests.chaos.fuzz import Case, disturb, scramble

__all__ = ["conversations"]

_ENTRIES: tuple[object, ...] = (
    {
        "id": "a",
        "image": "picture.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "seven"},
        ],
    },
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "picture.png"},
                    {"type": "text", "text": "and this?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "nine"}]},
        ]
    },
    {
        "system": "be brief",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "three"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "<image>find <ref-object>"},
            {"role": "assistant", "content": "<bbox>"},
        ],
        "images": ["picture.png"],
        "objects": {"ref": ["it"], "bbox": [[1, 2, 3, 4]]},
    },
    {
        "conversations": [
            {"from": "human", "value": "<image>what?"},
            {"from": "gpt", "value": "seven"},
        ],
        "images": [{"bytes": None, "path": "picture.png"}],
    },
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    {"question": "what?", "answers": ["seven", "7"], "image": "picture.png"},
    {"image": "picture.png", "caption": "a picture"},
    {"text": "some text"},
    {"texts": ["a", None, "b"], "images": [None, "picture.png", None]},
    {
        "text_list": ["a", "b"],
        "image_info": [{"image_name": "picture.png", "matched_text_index": 1}],
    },
)


@contextmanager
def conversations() -> Iterator[Case]:
    """Cases: a file of two entries, one of which is wrong, or whose bytes are."""
    from megatron.mimo.data.reading.sample_reader import SampleReader
    from megatron.mimo.data.sources import open_file
    from tests.unit.mimo.data.chats import chat_of

    read = SampleReader(chat=chat_of("llava"), seq_length=256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8), (9, 200, 30)).save(folder / "picture.png")

        def case(random: Random) -> None:
            entries = [random.choice(_ENTRIES), random.choice(_ENTRIES)]
            for _ in range(random.choice([1, 1, 2, 4])):
                entries[1] = disturb(entries[1], random)
            as_lines = random.random() < 0.7
            text = "\n".join(map(json.dumps, entries)) if as_lines else json.dumps(entries)
            data = text.encode()
            if random.random() < 0.2:
                data = scramble(data, random)
            file = folder / ("data.jsonl" if as_lines else "data.json")
            file.write_bytes(data)
            records = open_file(file, folder / "index")
            for place in range(len(records)):
                read(records[place])
            shutil.rmtree(folder / "index")  # it is by size and time of the file

        yield case
