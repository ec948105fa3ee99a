"""Reads parts of a message's content: text, and media in several spellings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import MEDIA_KINDS, ContentPart
from megatron.mimo.data.formats.keys import SETTINGS, known_keys, read_settings, short
from megatron.mimo.data.formats.record_media import RecordMedia

__all__ = ["Place", "read_part"]

# OpenAI's spellings: the type of a part is also the key of what it holds.
_URLS = {f"{kind}_url": kind for kind in MEDIA_KINDS}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part stands.

    Attributes:
        media: of the record.
        name: of the message, for errors.
        ignored: keys that are read over.
    """

    media: RecordMedia
    name: str
    ignored: Collection[str]


def read_part(part: Any, place: Place) -> ContentPart:
    """A part of a content that is a list.

    Raises:
        InputError: it is of no known type, or names no medium.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
        return ContentPart(kind="text", value=part)
    if kind == "text" and isinstance(part.get("text"), str):
        return ContentPart(
            kind="text",
            value=known_keys(part, {"type", "text"}, place.name, place.ignored)["text"],
        )
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise InputError(
            f"{place.name}: cannot read {short(part)}; expected "
            '{"type": "text", "text": ...} or {"type": "image" (video, audio), "path": ...}'
        )
    return read(part, place)


def _medium(part: Mapping[str, Any], place: Place) -> ContentPart:
    """``{"type": "image", "path": ...}``; without a path, the next that the record names."""
    kind = part["type"]
    settings = SETTINGS if kind == "video" else ()
    given = known_keys(part, {"type", "path", "url", kind, *settings}, place.name, place.ignored)
    values = [given[key] for key in ("path", "url", kind) if key in given]
    if len(values) > 1 and any(one != values[0] for one in values):
        keys = [key for key in ("path", "url", kind) if key in given]
        raise InputError(
            f'{place.name}: the {kind} has "{keys[0]}" and "{keys[1]}", which differ; keep one'
        )
    read = read_settings(given, place.name) if settings else {}
    if not values and place.media.waiting(kind):
        taken = place.media.take(kind, place.name)
        return ContentPart(kind=kind, value=taken.value, settings=read)
    if not values or (isinstance(values[0], list) and kind != "video"):
        raise InputError(f'{place.name}: the {kind} has no "path" to a file; got {sorted(part)}')
    return place.media.part(kind, values[0], place.name, read)


def _url(part: Mapping[str, Any], place: Place) -> ContentPart:
    """``{"type": "image_url", "image_url": {"url": ...}}``, or the address alone."""
    key = part["type"]
    given = known_keys(part, {"type", key}, place.name, place.ignored)
    value = given.get(key)
    if isinstance(value, Mapping):
        if value.get("detail") == "auto":  # the service's own choice
            value = {name: one for name, one in value.items() if name != "detail"}
        value = known_keys(value, {"url"}, place.name, place.ignored).get("url")
    if not isinstance(value, str):
        raise InputError(
            f'{place.name}: the {key} is {short(part.get(key))}; expected {{"url": ...}} with a '
            "path or a data: URI"
        )
    return place.media.part(_URLS[key], value, place.name)


def _input_audio(part: Mapping[str, Any], place: Place) -> ContentPart:
    """``{"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}}``."""
    value = part.get("input_audio")
    if not isinstance(value, Mapping) or not isinstance(value.get("data"), str):
        raise InputError(
            f'{place.name}: the input_audio is {short(value)}; expected {{"data": base64, '
            '"format": "wav"}'
        )
    known_keys(part, {"type", "input_audio"}, place.name, place.ignored)
    known_keys(value, {"data", "format"}, place.name, place.ignored)
    uri = f"data:audio/{value.get('format') or 'wav'};base64,{value['data']}"
    return place.media.part("audio", uri, place.name)


_READERS: Mapping[str, Callable[[Mapping[str, Any], Place], ContentPart]] = {
    **dict.fromkeys(MEDIA_KINDS, _medium),
    **dict.fromkeys(_URLS, _url),
    "input_audio": _input_audio,
}
