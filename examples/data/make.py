"""Writes the example files of this folder: ``python examples/data/make.py``.

Every file is a few records of one layout that ``docs/data.md`` lists; tests read each of them. The
pictures, the sound and the clip are drawn here.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import shutil
import tarfile
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
MEDIA = HERE / "media"
COLOURS = {"cat": (200, 120, 40), "dog": (60, 90, 200)}


def picture(name: str, side: int = 32) -> Image.Image:
    """A disc of the animal's colour."""
    image = Image.new("RGB", (side, side), (240, 240, 230))
    ImageDraw.Draw(image).ellipse((4, 4, side - 5, side - 5), fill=COLOURS[name])
    return image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_media() -> None:
    """Pictures, a clip of four frames at four per second, a second of sound."""
    MEDIA.mkdir(exist_ok=True)
    (MEDIA / "cat.png").write_bytes(encoded(picture("cat")))
    (MEDIA / "dog.jpg").write_bytes(encoded(picture("dog"), "JPEG"))
    frames = [Image.new("RGB", (32, 32), (240, 240, 230)) for _ in range(4)]
    for place, frame in enumerate(frames):
        frame.paste(picture("cat", 16), (4 * place, 8))
    frames[0].save(MEDIA / "clip.gif", save_all=True, append_images=frames[1:], duration=250)
    with wave.open(str(MEDIA / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        samples = (int(9000 * math.sin(place * 440 * math.tau / 8000)) for place in range(2000))
        sound.writeframes(b"".join(one.to_bytes(2, "little", signed=True) for one in samples))


def lines(name: str, records: Iterable[Mapping[str, Any]]) -> bytes:
    """Write a file with one record per line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    (HERE / name).write_text(text)
    return text.encode()


def user(content: Any) -> dict[str, Any]:
    """A turn of the user's."""
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    """A turn of the assistant's."""
    return {"role": "assistant", "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


SPOKEN = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A cat."},
]
CALL = {"name": "weather", "arguments": '{"place": "Rome"}'}


def make_conversations() -> None:
    """The layouts of conversations."""
    uri = "data:image/png;base64," + base64.b64encode(encoded(picture("cat"))).decode()
    llava = [
        {"id": "0", "image": "media/cat.png", "conversations": SPOKEN},
        {"id": "1", "conversations": [{"from": "human", "value": "Hi"}, SPOKEN[1]]},
    ]
    (HERE / "llava.json").write_text(json.dumps(llava, indent=1) + "\n")
    image = {"type": "image", "path": "media/cat.png"}
    ask = {"type": "text", "text": "What is this?"}
    url = {"type": "image_url", "image_url": {"url": uri, "detail": "auto"}}
    lines(
        "messages.jsonl",
        [
            {"messages": [user([image, ask]), assistant("A cat.")]},
            {"messages": [user([url, ask]), assistant("A cat.")]},
        ],
    )
    lines(
        "marked_messages.jsonl",
        [
            {
                "messages": [user("<image>What is this?"), assistant("A cat.")],
                "images": ["media/cat.png"],
            },
            {
                "messages": [user([{"type": "image"}, ask]), assistant("A dog.")],
                "images": ["media/dog.jpg"],
            },
            {"messages": [user("What is this?"), assistant("A cat.")], "images": ["media/cat.png"]},
        ],
    )
    exchanges = [
        {"user": "What is this?", "assistant": "A cat."},
        {"user": "Is it blue?", "assistant": "No."},
    ]
    lines("exchanges.jsonl", [{"images": ["media/cat.png"], "texts": exchanges}])
    lines(
        "video_audio.jsonl",
        [
            {
                "messages": [user("<video>What moves?"), assistant("A disc.")],
                "videos": ["media/clip.gif"],
            },
            {
                "messages": [user("<audio>What is it?"), assistant("A tone.")],
                "audios": ["media/tone.wav"],
            },
        ],
    )


def make_calls() -> None:
    """Tools that are called, in two layouts."""
    lines(
        "tools.jsonl",
        [
            {
                "tools": [WEATHER],
                "messages": [
                    user("Is it warm in Rome?"),
                    assistant(None, tool_calls=[{"id": "1", "type": "function", "function": CALL}]),
                    {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 31}'},
                    assistant("Yes, 31 degrees."),
                ],
            }
        ],
    )
    called = {
        "from": "function_call",
        "value": json.dumps({**CALL, "arguments": {"place": "Rome"}}),
    }
    lines(
        "sharegpt.jsonl",
        [
            {"conversations": SPOKEN, "images": ["media/cat.png"], "system": "Be brief."},
            {
                "conversations": [
                    {"from": "human", "value": "Is it warm in Rome?"},
                    called,
                    {"from": "observation", "value": '{"celsius": 31}'},
                    {"from": "gpt", "value": "Yes, 31 degrees."},
                ],
                "tools": json.dumps([WEATHER]),
            },
            {"conversation": [{"human": "Hi", "assistant": "Hello!"}]},
        ],
    )


def make_questions() -> None:
    """Layouts of one question and its answer, flags for labels, thoughts."""
    alpaca = [
        {
            "instruction": "Name the animal.",
            "input": "",
            "output": "A cat.",
            "images": ["media/cat.png"],
        },
        {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["Hi", "Hello!"]]},
    ]
    (HERE / "alpaca.json").write_text(json.dumps(alpaca, indent=1) + "\n")
    lines(
        "swift.jsonl",
        [
            {
                "messages": [user("<image>Find <ref-object>."), assistant("It is at <bbox>.")],
                "images": ["media/cat.png"],
                "objects": {"ref": ["the cat"], "bbox": [[4, 4, 27, 27]]},
            },
            {"query": "<image>What is this?", "response": "A dog.", "images": ["media/dog.jpg"]},
        ],
    )
    lines(
        "prompt_completion.jsonl",
        [
            {"prompt": "What is 2 and 3?", "completion": "5"},
            {
                "prompt": [user([{"type": "image"}, {"type": "text", "text": "What is this?"}])],
                "completion": [assistant("A cat.")],
                "images": ["media/cat.png"],
            },
        ],
    )
    lines(
        "visual_questions.jsonl",
        [
            {"image": "media/cat.png", "question": "What is this?", "answer": "A cat."},
            {"image": "media/dog.jpg", "context": "What is this?", "answers": ["A dog.", "dog"]},
        ],
    )
    chat = [user("Hi"), assistant("Hello!"), user("2 and 3?"), assistant("5")]
    lines(
        "labels.jsonl",
        [
            {"messages": [*chat[:1], assistant("Hello!", weight=0), *chat[2:]]},
            {"messages": [*chat[:1], assistant("Hello!", loss=True), *chat[2:]]},
        ],
    )
    lines(
        "thinking.jsonl",
        [{"messages": [user("2 and 3?"), assistant("<think>2 + 3 = 5</think>\n\n5")]}],
    )


def make_documents() -> None:
    """Layouts for pretraining."""
    text = lines("text.jsonl", [{"text": "Cats are small."}, {"text": "Dogs bark."}])
    (HERE / "text.jsonl").unlink()
    with gzip.GzipFile(HERE / "text.jsonl.gz", "wb", mtime=0) as packed:
        packed.write(text)
    import zstandard

    (HERE / "text.jsonl.zst").write_bytes(zstandard.compress(text))
    lines(
        "captions.jsonl",
        [
            {"image": "media/cat.png", "caption": "An orange disc."},
            {"image": "media/dog.jpg", "captions": ["A blue disc.", "A disc."]},
        ],
    )
    lines(
        "interleaved.jsonl",
        [
            {"texts": ["A cat:", None, "and no dog."], "images": [None, "media/cat.png", None]},
            {
                "text_list": ["Two animals.", "This one barks."],
                "image_info": [{"image_name": "media/dog.jpg", "matched_text_index": 1}],
            },
            {
                "text": "A cat: <image> and a dog: <image>",
                "images": ["media/cat.png", "media/dog.jpg"],
            },
        ],
    )


def make_tables() -> None:
    """Parquet, Arrow, and a folder saved by ``datasets``: images lie in the columns."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [
        [user("<image>What is this?"), assistant("A cat.")],
        [user("<image>What is this?"), assistant("A dog.")],
    ]
    stored = [
        [{"bytes": encoded(picture("cat")), "path": None}],
        [{"bytes": encoded(picture("dog"), "JPEG"), "path": "dog.jpg"}],
    ]
    table = pa.table({"messages": chats, "images": stored})
    pq.write_table(table, HERE / "embedded.parquet")
    paths = pa.table({"messages": chats, "images": [["media/cat.png"], ["media/dog.jpg"]]})
    place = str(HERE / "paths.arrow")
    with pa.OSFile(place, "wb") as file, pa.ipc.new_stream(file, paths.schema) as writer:
        writer.write_table(paths)
    heard = {
        "messages": [
            [user("<video>What moves?"), assistant("A disc.")],
            [user("<audio>What is it?"), assistant("A tone.")],
        ],
        "videos": [[{"bytes": (MEDIA / "clip.gif").read_bytes(), "path": "clip.gif"}], None],
        "audios": [None, [{"bytes": (MEDIA / "tone.wav").read_bytes(), "path": None}]],
    }
    pq.write_table(pa.table(heard), HERE / "video_audio.parquet")
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    saved = datasets.Dataset.from_dict(
        {"messages": chats, "images": [[picture("cat")], [picture("dog")]]}, features=features
    )
    shutil.rmtree(HERE / "saved_dataset", ignore_errors=True)
    saved.save_to_disk(str(HERE / "saved_dataset"))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of a tar, the same whenever it is written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_tars() -> None:
    """A WebDataset tar, and the same for Energon, which ``energon prepare`` has indexed.

    ``energon prepare energon --non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset``
    """
    chat = {"conversations": SPOKEN}
    energon = HERE / "energon"
    energon.mkdir(exist_ok=True)
    for path in (HERE / "shard-000000.tar", energon / "shard-000000.tar"):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            add(tar, "000000.jpg", encoded(picture("cat"), "JPEG"))
            add(tar, "000000.json", json.dumps(chat).encode())
            add(tar, "000001.jpg", encoded(picture("dog"), "JPEG"))
            add(tar, "000001.txt", b"A blue disc.")


def main() -> None:
    """Write all."""
    make_media()
    make_conversations()
    make_calls()
    make_questions()
    make_documents()
    make_tables()
    make_tars()


if __name__ == "__main__":
    main()
