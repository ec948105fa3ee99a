"""``messages`` whose contents are text or lists of parts, as OpenAI and transformers have them.

{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"},
                                           {"type": "text", "text": "What is this?"}]},
              {"role": "assistant", "content": "A cat."}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import ContentPart, Conversation, Turn
from megatron.mimo.data.formats.content_parts import Place, read_part
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import FIELDS, LEARNED, known_keys, learned, short
from megatron.mimo.data.formats.marks import marked_parts
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia
from megatron.mimo.data.formats.tool_calls import as_calls, calls_of_text

__all__ = ["MEDIA_COLUMNS", "MESSAGES", "message"]

MEDIA_COLUMNS = ("image", "video", "audio", "images", "videos", "audios")

# Roles of several formats -> those of chat templates.
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "model": "assistant",
    "tool_call": "assistant",
    "tool_response": "tool",
}


def message(turn: Any, place: Place, *, marked: bool = False) -> Turn:
    """One message.

    Args:
        turn: an object with role and content.
        place: where it stands.
        marked: ``<image>`` in a content that is text stands for a medium.

    Raises:
        InputError: it is malformed.
    """
    name = place.name
    calls = isinstance(turn, Mapping) and bool(turn.get("tool_calls"))
    role = turn.get("role") if isinstance(turn, Mapping) else None
    is_known = isinstance(role, str) and role in _ROLES
    if not is_known or (turn.get("content") is None and not calls):
        raise InputError(
            f"{name}: expected an object with a role (system, user, assistant, tool) and a "
            f"content, got {short(turn)}"
        )
    given = known_keys(turn, {"role", "content", *FIELDS, *LEARNED}, name, place.ignored)
    content, spoken = given.get("content", ""), _ROLES[str(role)]
    fields = {key: given[key] for key in FIELDS if given.get(key)}
    if calls:
        fields["tool_calls"] = as_calls(given["tool_calls"], name)
    if role == "tool_call" and isinstance(content, str):
        fields["tool_calls"], content = calls_of_text(content, name), ""
    parts: tuple[ContentPart, ...]
    if isinstance(content, str):
        plain = (ContentPart(kind="text", value=content),)
        parts = marked_parts(content, place.media, name) if marked else plain
    elif isinstance(content, list | tuple):
        parts = tuple(read_part(part, place) for part in content)
    else:
        raise InputError(f"{name}: content is {type(content).__name__}; expected text or a list")
    return Turn(role=spoken, content=parts, is_learned=learned(given, spoken, name), fields=fields)


def _recognises(record: RawRecord) -> bool:
    value = record.value
    return "messages" in value and not any(key in value for key in MEDIA_COLUMNS)


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    given = known_keys(
        object_of(record), {"messages", "system", "tools"}, record.name, options.ignored
    )
    media = RecordMedia(record)
    has_members = media.has_waiting
    turns = [
        message(
            turn,
            Place(media=media, name=f"{record.name}, message {number}", ignored=options.ignored),
            marked=has_members,
        )
        for number, turn in enumerate(turn_list(given.get("messages"), "messages", record.name))
    ]
    return conversation(record, given, turns, media, options)


MESSAGES = Format(
    name="messages",
    summary="messages with content parts (OpenAI, transformers)",
    recognises=_recognises,
    read=_read,
)
