"""Chats of tiny models, and conversations to put into them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record
from megatron.mimo.data.sources import open_file
from megatron.mimo.models import load_family
from megatron.mimo.recipes.tiny import processors


@cache
def chat_of(name: str) -> Chat:
    family = load_family(name)
    config = family.tiny()
    processor = getattr(processors, f"{name}_processor")(config)
    return Chat(family=family, config=config, processor=processor)


def parse(entry: Any, place: str = "line 1", folder: Path = Path()) -> Any:
    """What a record of ``folder``/a.jsonl holds."""
    record = RawRecord(value=entry, file=folder / "a.jsonl", place=place)
    return read_record(record, ReadingOptions())


class ReadFile(Sequence[Any]):
    """What the records of a file hold, read when they are asked for; its index lies beside it."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._records = open_file(path, path.parent / "index")
        self._options = ReadingOptions(**options)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError
        return read_record(self._records[number], self._options)


def talk(*turns: tuple[str, Sequence[str | tuple[str, Any]]], name: str = "talk") -> Conversation:
    return Conversation(
        name=name,
        turns=tuple(
            Turn(
                role=role,
                content=tuple(
                    ContentPart(kind="text", value=part)
                    if isinstance(part, str)
                    else ContentPart(kind=part[0], value=part[1])
                    for part in parts
                ),
            )
            for role, parts in turns
        ),
    )


def with_template(template: str) -> Chat:
    known = chat_of("llava")
    processor = processors.llava_processor(known.config)
    processor.chat_template = template
    return Chat(family=known.family, config=known.config, processor=processor)
