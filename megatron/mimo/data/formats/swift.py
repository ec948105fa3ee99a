"""ms-swift's records: messages with ``objects``, or ``query`` with ``response``.

{"messages": [{"role": "user", "content": "<image>Find <ref-object>"},
              {"role": "assistant", "content": "<bbox>"}],
 "images": ["a.png"], "objects": {"ref": ["the cat"], "bbox": [[10, 20, 110, 220]]}}
{"query": "<image>What is this?", "response": "A cat.", "images": ["a.png"]}

``<ref-object>`` and ``<bbox>`` stand for the objects in order. Boxes are written ``[x1, y1, x2,
y2]``: in the model's units where the options have a writer of boxes, else as their numbers stand.
``bbox_type`` says what they are given in: pixels of the image ("real", the default), shares of its
sides ("norm1") or thousandths ("norm1000"); ``image_id`` says of each box which image it is in, the
first by default.
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
from megatron.mimo.data.media.boxes import BOX_TYPES

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
        media = RecordMedia(record, COLUMNS)
        objects = _Objects(given.get("objects"), name, media, options)
        pairs = [(objects.written(ask), objects.written(answer)) for ask, answer in pairs]
        objects.refuse_left()
        return conversation(record, given, question_turns(pairs, media, name), media, options)
    given = known_keys(value, {"messages", *media_keys}, name, options.ignored)
    media = RecordMedia(record, COLUMNS)
    objects = _Objects(given.get("objects"), name, media, options)
    messages = [
        {**turn, "content": objects.written(turn["content"])}
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
        else turn
        for turn in turn_list(given.get("messages"), "messages", name)
    ]
    objects.refuse_left()
    turns = marked_turns(messages, record, media, options)
    return conversation(record, given, turns, media, options)


class _Objects:
    """Writes objects into text, in the order of their marks."""

    def __init__(
        self, objects: Any, name: str, media: RecordMedia, options: ReadingOptions
    ) -> None:
        objects = {} if objects is None else objects
        if not isinstance(objects, Mapping):
            raise InputError(f"{name}: 'objects' is {short(objects)}; expected ref and bbox")
        read = {"ref", "bbox", "bbox_type", "image_id"}
        given = known_keys(objects, read, f"{name}, objects", ())
        kind = given.get("bbox_type") or "real"
        if kind not in BOX_TYPES:
            raise InputError(
                f"{name}: 'bbox_type' is {short(kind)}; expected one of {', '.join(BOX_TYPES)}"
            )
        boxes = [_numbers(box, name) for box in read_list(given, "bbox", name)]
        if options.boxes is not None:
            images = _images(read_list(given, "image_id", name), media.images(), len(boxes), name)
            boxes = [
                options.boxes(box, kind, image, name)
                for box, image in zip(boxes, images, strict=True)
            ]
        self._name = name
        self._left: dict[str, Iterator[str]] = {
            "ref-object": iter([_text(ref, name) for ref in read_list(given, "ref", name)]),
            "bbox": iter([f"[{', '.join(map(str, box))}]" for box in boxes]),
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
        """Refuse objects for which no mark stands."""
        for mark, left in self._left.items():
            rest = list(left)
            if rest:
                raise InputError(f"{self._name}: no text has <{mark}> for {short(rest)}")


def _text(ref: Any, name: str) -> str:
    if not isinstance(ref, str):
        raise InputError(f"{name}: an object's ref is {short(ref)}; expected text")
    return ref


def _numbers(box: Any, name: str) -> list[float]:
    good = isinstance(box, list | tuple) and len(box) in (2, 4) and all(map(_is_number, box))
    if not good:
        raise InputError(
            f"{name}: a bbox is {short(box)}; expected [x1, y1, x2, y2], or [x, y] of a point"
        )
    return list(box)


def _images(numbers: list[Any], images: list[Any], boxes: int, name: str) -> list[Any]:
    """The image of each box."""
    numbers = [*numbers, *(0 for _ in range(boxes - len(numbers)))]
    good = [one for one in numbers if type(one) is int and 0 <= one < len(images)]
    if len(good) != boxes or len(numbers) != boxes:
        raise InputError(
            f"{name}: 'image_id' gives {boxes} boxes the images {short(numbers)}, and there are "
            f"{len(images)}; expected a number from 0 on for each box"
        )
    return [images[one] for one in numbers]


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) < 1e9 and math.isfinite(value)


SWIFT = Format(
    name="swift",
    summary="messages with objects, or query and response (ms-swift)",
    recognises=_recognises,
    read=_read,
)
