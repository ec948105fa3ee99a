"""Reads turns of ``from`` and ``value``, as LLaVA's and ShareGPT's files have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Turn
from megatron.mimo.data.formats.keys import LEARNED, known_keys, learned, short
from megatron.mimo.data.formats.marked_messages import marked_turns, names_none, without_marks
from megatron.mimo.data.formats.marks import marked_parts
from megatron.mimo.data.formats.record import RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia
from megatron.mimo.data.formats.tool_calls import calls_of_text

__all__ = ["spoken_turns"]

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def spoken_turns(
    turns: Sequence[Any], record: RawRecord, media: RecordMedia, options: ReadingOptions
) -> list[Turn]:
    """Turns with marks for media in their values; they may have ``role`` and ``content``, too.

    Raises:
        InputError: one is malformed; marks and media differ in number.
    """
    if isinstance(turns[0], Mapping) and "role" in turns[0]:
        return marked_turns(turns, record, media, options)
    had_media = media.has_waiting
    read = [
        _turn(turn, f"{record.name}, message {number}", media, options.ignored)
        for number, turn in enumerate(turns)
    ]
    return without_marks(read, media, record.name) if had_media and names_none(read) else read


def _turn(turn: Any, name: str, media: RecordMedia, ignored: Collection[str]) -> Turn:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if (
        not isinstance(speaker, str)
        or speaker not in _SPEAKERS
        or not isinstance(turn.get("value"), str)
    ):
        raise InputError(
            f"{name}: expected an object with from ({', '.join(_SPEAKERS)}) and value, got "
            f"{short(turn)}"
        )
    role = _SPEAKERS[speaker]
    given = known_keys(turn, {"from", "value", *LEARNED}, name, ignored)
    is_learned = learned(given, role, name)
    if speaker == "function_call":
        calls = calls_of_text(given["value"], name)
        return Turn(role=role, content=(), is_learned=is_learned, fields={"tool_calls": calls})
    parts = marked_parts(given["value"], media, name)
    return Turn(role=role, content=parts, is_learned=is_learned)
