"""ShareGPT's turns, with the keys for media and tools that LLaMA-Factory and ms-swift add.

{"conversations": [{"from": "human", "value": "<image>What is this?"},
                   {"from": "gpt", "value": "A cat."}],
 "images": ["a.png"], "system": "Be brief.", "tools": "[...]"}
{"conversation": [{"human": "What is this?", "assistant": "A cat."}]}

Turns may also have ``role`` and ``content``. ``function_call`` and ``observation`` are a call of a
tool and what it returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys, short
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia
from megatron.mimo.data.formats.spoken import spoken_turns

__all__ = ["SHAREGPT"]

_COLUMNS = {"images": "image", "videos": "video", "audios": "audio"}
_KEYS = ("conversations", "conversation")


def _recognises(record: RawRecord) -> bool:
    return any(key in record.value for key in _KEYS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    read = {*_KEYS, "system", "tools", *_COLUMNS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    key = next((key for key in _KEYS if key in given), _KEYS[0])
    turns = turn_list(given.get(key), key, record.name)
    media = RecordMedia(record, _COLUMNS)
    if isinstance(turns[0], Mapping) and "human" in turns[0]:
        turns = [turn for pair in turns for turn in _of_pair(pair, record.name, options)]
    spoken = spoken_turns(turns, record, media, options)
    return conversation(record, given, spoken, media, options)


def _of_pair(pair: Any, name: str, options: ReadingOptions) -> list[dict[str, Any]]:
    """Question and answer in one object."""
    good = isinstance(pair, Mapping) and all(
        isinstance(pair.get(key), str) for key in ("human", "assistant")
    )
    if not good:
        raise InputError(f"{name}: expected an object with human and assistant, got {short(pair)}")
    known_keys(pair, {"human", "assistant"}, name, options.ignored)
    return [
        {"from": "human", "value": pair["human"]},
        {"from": "gpt", "value": pair["assistant"]},
    ]


SHAREGPT = Format(
    name="sharegpt",
    summary="conversations of from and value + images, videos, audios (ShareGPT)",
    recognises=_recognises,
    read=_read,
)
