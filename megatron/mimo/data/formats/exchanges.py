"""Questions and answers to the same images, as The Cauldron and FineVision have them.

{"images": ["a.png"], "texts": [{"user": "What is this?", "assistant": "A cat."}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys, short
from megatron.mimo.data.formats.marked_messages import COLUMNS
from megatron.mimo.data.formats.questions import question_turns
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["EXCHANGES"]

_SAID = ("user", "assistant")


def _recognises(record: RawRecord) -> bool:
    texts = record.value.get("texts")
    first = texts[0] if isinstance(texts, list) and texts else None
    return isinstance(first, Mapping) and any(key in first for key in _SAID)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    given = known_keys(
        object_of(record), {"texts", "system", *COLUMNS}, record.name, options.ignored
    )
    media = RecordMedia(record, COLUMNS)
    pairs = [
        _pair(one, f"{record.name}, text {number}", options)
        for number, one in enumerate(turn_list(given.get("texts"), "texts", record.name))
    ]
    return conversation(record, given, question_turns(pairs, media, record.name), media, options)


def _pair(exchange: Any, name: str, options: ReadingOptions) -> tuple[str, str]:
    said = (
        known_keys(exchange, _SAID, name, options.ignored) if isinstance(exchange, Mapping) else {}
    )
    if not all(isinstance(said.get(key), str) for key in _SAID):
        raise InputError(
            f"{name}: expected an object with user and assistant, got {short(exchange)}"
        )
    return said["user"], said["assistant"]


EXCHANGES = Format(
    name="exchanges",
    summary="texts of user and assistant + images (The Cauldron, FineVision)",
    recognises=_recognises,
    read=_read,
)
