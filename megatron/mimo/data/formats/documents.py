"""Captions and pure text, to be continued rather than answered.

{"text": "A long article ..."}
{"image": "a.png", "caption": "A cat on a mat."}
{"image": "a.png", "captions": ["A cat on a mat.", "A cat."]}
{"image": "a.png", "sentences": [{"raw": "A cat on a mat.", "tokens": ["a", "cat", ...]}]}

In a tar, ``000012.jpg`` and ``000012.txt`` are such a record. Media stand before the text. Of
several captions, as COCO and Flickr have them, each epoch learns the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import ContentPart, Document
from megatron.mimo.data.formats.conversing import object_of
from megatron.mimo.data.formats.keys import known_keys
from megatron.mimo.data.formats.marked_messages import COLUMNS
from megatron.mimo.data.formats.marks import media_first
from megatron.mimo.data.formats.questions import text_of
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["CAPTIONS", "TEXT"]

_CAPTIONS = ("caption", "captions", "sentences", "text")
_NAMES = ("filename", "filepath")  # of the image, which is there


def _recognises_text(record: RawRecord) -> bool:
    return isinstance(record.value.get("text"), str) and not _has_media(record)


def _read_text(record: RawRecord, options: ReadingOptions) -> Document:
    given = known_keys(object_of(record), {"text"}, record.name, options.ignored)
    media = RecordMedia(record)
    media.refuse_left()
    text = text_of(given, "text", record.name)
    return Document(name=record.name, content=(ContentPart(kind="text", value=text),))


def _recognises_captions(record: RawRecord) -> bool:
    return _caption_key(record.value) is not None and _has_media(record)


def _read_captions(record: RawRecord, options: ReadingOptions) -> Document:
    read = {*_CAPTIONS, *_NAMES, *COLUMNS}
    given = known_keys(object_of(record), read, record.name, options.ignored)
    found = [key for key in _CAPTIONS if given.get(key)]
    if any(given[key] != given[found[0]] for key in found):
        raise InputError(
            f"{record.name}: has {found}, and one of them would not be read; leave one out with "
            f"--ignore-keys {found[0]}"
        )
    media = RecordMedia(record, COLUMNS)
    if not media.has_waiting:
        raise InputError(f"{record.name}: has no medium; expected one under 'image' or 'images'")
    parts = media_first(media, record.name)
    media.refuse_left()
    text = _caption(given, found[0] if found else "caption", record, options)
    return Document(name=record.name, content=(*parts, ContentPart(kind="text", value=text)))


def _has_media(record: RawRecord) -> bool:
    return bool(record.members) or any(record.value.get(key) for key in COLUMNS)


def _caption_key(value: Mapping[str, Any]) -> str | None:
    kinds = str | list | tuple | Mapping
    return next((key for key in _CAPTIONS if isinstance(value.get(key), kinds)), None)


def _caption(given: Mapping[str, Any], key: str, record: RawRecord, options: ReadingOptions) -> str:
    """The caption, or the one of several whose turn it is."""
    value, name = given.get(key), record.name
    captions = []
    for one in value if isinstance(value, list | tuple) and value else [value]:
        if isinstance(one, Mapping):
            one = known_keys(one, {"raw", "tokens"}, name, options.ignored).get("raw")
        captions.append(text_of({key: one}, key, name))
    return captions[record.epoch % len(captions)]


TEXT = Format(
    name="text",
    summary="text alone, for pretraining",
    recognises=_recognises_text,
    read=_read_text,
)
CAPTIONS = Format(
    name="captions",
    summary="caption, captions, sentences (or text) + image, for pretraining",
    recognises=_recognises_captions,
    read=_read_captions,
)
