"""``messages`` with their media beside them, as ms-swift, LLaMA-Factory and TRL have them.

{"messages": [{"role": "user", "content": "<image>What is this?"},
              {"role": "assistant", "content": "A cat."}],
 "images": ["a.png"]}

A medium stands where a mark is, or a part without a path. Where a record has neither, all of its
media stand before the text of the first turn of the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation, Turn
from megatron.mimo.data.formats.content_parts import Place
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys
from megatron.mimo.data.formats.marks import media_first
from megatron.mimo.data.formats.messages import MEDIA_COLUMNS, message
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["COLUMNS", "MARKED_MESSAGES", "marked_turns", "names_none", "without_marks"]

COLUMNS = {key: key.rstrip("s") for key in MEDIA_COLUMNS}  # the kind that each key holds


def marked_turns(
    messages: Sequence[Any], record: RawRecord, media: RecordMedia, options: ReadingOptions
) -> list[Turn]:
    """Messages in whose texts marks stand for the record's media.

    Raises:
        InputError: one is malformed; marks and media differ in number.
    """
    had_media = media.has_waiting
    turns = [
        message(
            turn,
            Place(media=media, name=f"{record.name}, message {number}", ignored=options.ignored),
            marked=True,
        )
        for number, turn in enumerate(messages)
    ]
    return without_marks(turns, media, record.name) if had_media and names_none(turns) else turns


def names_none(turns: Sequence[Turn]) -> bool:
    """Whether no turn has a place for a medium."""
    return all(part.kind == "text" for turn in turns for part in turn.content)


def without_marks(turns: Sequence[Turn], media: RecordMedia, name: str) -> list[Turn]:
    """Turns of a record whose texts have no marks: its media stand before the first question.

    Raises:
        InputError: there is no turn of the user.
    """
    numbers = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not numbers:
        raise InputError(f"{name}: has media and no turn of the user that they could stand in")
    turns, first = list(turns), numbers[0]
    content = (*media_first(media, name), *turns[first].content)
    turns[first] = replace(turns[first], content=content)
    return turns


def _recognises(record: RawRecord) -> bool:
    value = record.value
    return "messages" in value and any(key in value for key in MEDIA_COLUMNS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    read = {"messages", "system", "tools", *MEDIA_COLUMNS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    messages = turn_list(given.get("messages"), "messages", record.name)
    _refuse_two_ways(messages, given, record.name)
    media = RecordMedia(record, COLUMNS)
    return conversation(
        record, given, marked_turns(messages, record, media, options), media, options
    )


def _refuse_two_ways(messages: Sequence[Any], given: Mapping[str, Any], name: str) -> None:
    """Refuse media in parts and beside the turns: where the latter belong cannot be told."""
    for turn in messages:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            keys = ("path", "url", kind, "image_url", "video_url", "audio_url", "input_audio")
            if kind != "text" and isinstance(kind, str) and any(part.get(key) for key in keys):
                beside = [key for key in MEDIA_COLUMNS if given.get(key)]
                raise InputError(
                    f"{name}: {beside} would not be read; its messages name their media "
                    f"themselves: leave out {beside}, or the paths in the parts"
                )


MARKED_MESSAGES = Format(
    name="marked-messages",
    summary="messages + images, videos, audios with <image> marks (ms-swift, LLaMA-Factory, TRL)",
    recognises=_recognises,
    read=_read,
)
