"""Documents in which text and images alternate, to be continued rather than answered.

{"texts": ["Once ...", null, "and then"], "images": [null, "a.png", null]}
{"text_list": ["Once ...", "and then"],
 "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}
{"sequence": ["Once ...", {"type": "image", "path": "a.png"}, "and then"]}
{"text": "Once ... <image> and then", "images": ["a.png"]}

The first is OBELICS' form, the second MMC4's (an image stands before the text it matches), the
third Energon's, the fourth has a mark for each medium.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import ContentPart, Document
from megatron.mimo.data.formats.content_parts import Place, read_part
from megatron.mimo.data.formats.conversing import object_of
from megatron.mimo.data.formats.keys import known_keys, read_list, short
from megatron.mimo.data.formats.marked_messages import COLUMNS
from megatron.mimo.data.formats.marks import marked_parts, names_no_medium
from megatron.mimo.data.formats.record import Format, RawRecord, ReadingOptions
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["INTERLEAVED"]


def _recognises(record: RawRecord) -> bool:
    value = record.value
    has_marks = isinstance(value.get("text"), str) and not names_no_medium([value["text"]])
    return (
        ("texts" in value and "images" in value)
        or "text_list" in value
        or isinstance(value.get("sequence"), list)
        or (has_marks and (bool(record.members) or any(value.get(key) for key in COLUMNS)))
    )


def _read(record: RawRecord, options: ReadingOptions) -> Document:
    value, name = object_of(record), record.name
    if "texts" in value:
        given = known_keys(value, {"texts", "images"}, name, options.ignored)
        media = RecordMedia(record)
        parts = _alternating(given, media, name)
    elif "text_list" in value:
        given = known_keys(value, {"text_list", "image_info"}, name, options.ignored)
        media = RecordMedia(record)
        parts = _matched(given, media, name, options)
    elif "sequence" in value:
        given = known_keys(value, {"sequence"}, name, options.ignored)
        media = RecordMedia(record)
        place = Place(media=media, name=name, ignored=options.ignored)
        parts = [read_part(part, place) for part in _list(given, "sequence", name)]
    else:
        given = known_keys(value, {"text", *COLUMNS}, name, options.ignored)
        media = RecordMedia(record, COLUMNS)
        parts = list(marked_parts(str(given.get("text") or ""), media, name))
    media.refuse_left()
    if not any(part.kind == "text" and part.value.strip() for part in parts):
        raise InputError(f"{name}: has no text; there is nothing to learn from it")
    return Document(name=name, content=tuple(parts))


def _alternating(given: Mapping[str, Any], media: RecordMedia, name: str) -> list[ContentPart]:
    """Two lists of equal length; each place has a text or an image."""
    texts, images = _list(given, "texts", name), _list(given, "images", name)
    if len(texts) != len(images):
        raise InputError(
            f"{name}: {len(texts)} texts and {len(images)} images; expected as many of each, with "
            "null where the other stands"
        )
    parts = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None) or not isinstance(text, str | None):
            raise InputError(
                f"{name}, place {number}: text {short(text)} and image {short(image)}; expected "
                "one of them, and null for the other"
            )
        parts.append(
            media.part("image", image, f"{name}, place {number}")
            if text is None
            else ContentPart(kind="text", value=text)
        )
    return parts


def _matched(
    given: Mapping[str, Any], media: RecordMedia, name: str, options: ReadingOptions
) -> list[ContentPart]:
    """Texts, and images that say before which of them they stand."""
    texts = _list(given, "text_list", name)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: 'text_list' is {short(texts)}; expected a list of texts")
    before: dict[int, list[ContentPart]] = {}
    for number, info in enumerate(read_list(given, "image_info", name)):
        where = f"{name}, image {number}"
        if not isinstance(info, Mapping):
            raise InputError(f"{where}: is {short(info)}; expected image_name and its place")
        read = {
            "image_name",
            "path",
            "matched_text_index",
            "matched_sim",
            "raw_url",
            "face_detections",
        }
        image = known_keys(info, read, where, options.ignored)
        at, path = image.get("matched_text_index"), image.get("image_name", image.get("path"))
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(texts):
            raise InputError(
                f"{where}: 'matched_text_index' is {short(at)}; expected 0 to {len(texts) - 1}"
            )
        before.setdefault(at, []).append(media.part("image", path, where))
    parts: list[ContentPart] = []
    for number, text in enumerate(texts):
        parts += [*before.get(number, ()), ContentPart(kind="text", value=text)]
    return parts


def _list(given: Mapping[str, Any], key: str, name: str) -> list[Any]:
    """A list that is not empty."""
    value = read_list(given, key, name)
    if not value:
        raise InputError(f"{name}: {key!r} is {short(given.get(key))}; expected a list")
    return value


INTERLEAVED = Format(
    name="interleaved",
    summary="texts + images (OBELICS), text_list + image_info (MMC4), text with <image> marks",
    recognises=_recognises,
    read=_read,
)
