"""What ms-swift adds to messages: ``objects``, and ``query`` with ``response``.

{"messages": [{"role": "user", "content": "<image>Find <ref-object>"},
              {"role": "assistant", "content": "<bbox>"}],
 "images": ["a.png"], "objects": {"ref": ["the cat"], "bbox": [[10, 20, 110, 220]]}}
{"query": "<image>What is this?", "response": "A cat.", "images": ["a.png"]}

``<ref-object>`` and ``<bbox>`` stand for the objects in order. Boxes are written as their numbers
stand: ``[x1, y1, x2, y2]``, so that they have to be in the units that the model is to learn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation
from megatron.mimo.data.formats.conversing import conversation, object_of, turn_list
from megatron.mimo.data.formats.keys import known_keys, read_list, short
from megatron.mimo.data.formats.marked_messages import COLUMNS, marked_turns
from megatron.mimo.data.formats.questions import history_of, question_turns, text_of
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["SWIFT"]

_MARK = re.compile(r"<(ref-object|bbox)>")


def _recognises(record: RawRecord) -> bool:
    value = record.value
    return ("messages" in value and bool(value.get("objects"))) or (
        "query" in value and "response" in value
    )


def _read(record: RawRecord, options: ReadingOptions) -> Conversation:
    name, value = record.name, object_of(record)
    media_keys = {"objects", "system", "tools", *COLUMNS}
    if "messages" not in value:
        read = {"query", "response", "history", *media_keys}
        given = known_keys(value, read, name, options.ignored)
        pairs = [
            *history_of(given, name),
            (text_of(given, "query", name), text_of(given, "response", name)),
        ]
        objects = _Objects(given.get("objects"), name)
        pairs = [(objects.written(ask), objects.written(answer)) for ask, answer in pairs]
        objects.refuse_left()
        media = RecordMedia(record, COLUMNS)
        return conversation(record, given, question_turns(pairs, media, name), media, options)
    given = known_keys(value, {"messages", *media_keys}, name, options.ignored)
    objects = _Objects(given.get("objects"), name)
    messages = [
        {**turn, "content": objects.written(turn["content"])}
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
        else turn
        for turn in turn_list(given.get("messages"), "messages", name)
    ]
    objects.refuse_left()
    media = RecordMedia(record, COLUMNS)
    turns = marked_turns(messages, record, media, options)
    return conversation(record, given, turns, media, options)


class _Objects:
    """Writes objects into text, in the order of their marks."""

    def __init__(self, objects: Any, name: str) -> None:
        objects = {} if objects is None else objects
        if not isinstance(objects, Mapping):
            raise InputError(f"{name}: 'objects' is {short(objects)}; expected ref and bbox")
        given = known_keys(objects, {"ref", "bbox", "bbox_type"}, f"{name}, objects", ())
        if given.get("bbox_type") not in (None, "real"):
            raise InputError(
                f"{name}: 'bbox_type' is {short(given['bbox_type'])}, and boxes are written as "
                "they stand; give them in the units that the model is to learn, without bbox_type"
            )
        self._name = name
        self._left: dict[str, Iterator[str]] = {
            "ref-object": iter([_text(ref, name) for ref in read_list(given, "ref", name)]),
            "bbox": iter([_box(box, name) for box in read_list(given, "bbox", name)]),
        }

    def written(self, text: str) -> str:
        """Text with its marks replaced."""
        return _MARK.sub(self._next, text)

    def _next(self, mark: re.Match[str]) -> str:
        found = next(self._left[mark[1]], None)
        if found is None:
            raise InputError(f"{self._name}: <{mark[1]}> without an object; 'objects' has too few")
        return found

    def refuse_left(self) -> None:
        """Refuse objects without a mark."""
        for mark, left in self._left.items():
            rest = list(left)
            if rest:
                raise InputError(f"{self._name}: no text has <{mark}> for {short(rest)}")


def _text(ref: Any, name: str) -> str:
    if not isinstance(ref, str):
        raise InputError(f"{name}: an object's ref is {short(ref)}; expected text")
    return ref


def _box(box: Any, name: str) -> str:
    good = isinstance(box, list | tuple) and len(box) in (2, 4) and all(map(_is_number, box))
    if not good:
        raise InputError(
            f"{name}: a bbox is {short(box)}; expected [x1, y1, x2, y2], or [x, y] of a point"
        )
    return f"[{', '.join(str(number) for number in box)}]"


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) < 1e9 and math.isfinite(value)


SWIFT = Format(
    name="swift",
    summary="messages with objects, or query and response (ms-swift)",
    recognises=_recognises,
    read=_read,
)
