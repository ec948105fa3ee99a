"""The media that a record names: paths, data URIs, bytes in columns, members of a tar."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import MEDIA_KINDS, ContentPart
from megatron.mimo.data.formats.keys import short
from megatron.mimo.data.formats.record import RawRecord
from megatron.mimo.data.media.source import EncodedMedium, shown

__all__ = ["RecordMedia", "kind_of_name"]

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_NAMES = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "jp2", "avif"),
    "video": ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac"),
}


def kind_of_name(name: str) -> str | None:
    """The kind of medium that a file of this name holds; None for others."""
    ending = name.rpartition(".")[2].lower()
    return next((kind for kind, endings in _NAMES.items() if ending in endings), None)


class RecordMedia:
    """The media of one record, and which of them have no place in its text yet.

    Media are named in the parts of messages, or beside the turns under keys, in the order of the
    marks that stand for them. If a record in a tar names none, the media beside it count, kind by
    kind in the order of their names.

    Args:
        record: whose they are.
        keys: keys that hold media for which marks stand, and the kind of each.

    Raises:
        InputError: a key holds neither a medium nor a list of them.
    """

    def __init__(self, record: RawRecord, keys: Mapping[str, str] | None = None) -> None:
        self._record = record
        self._unused = dict(record.members)
        self._waiting: dict[str, list[ContentPart]] = {kind: [] for kind in MEDIA_KINDS}
        self._keys: dict[str, str] = {}
        for key, kind in (keys or {}).items():
            values = _listed(record.value.get(key))
            if values is None:
                raise InputError(
                    f"{record.name}: {key!r} is {short(record.value[key])}; expected a path or a "
                    "list of paths"
                )
            if values:
                self._keys.setdefault(kind, key)
            for number, value in enumerate(values):
                where = f"{record.name}, {key} {number}" if len(values) > 1 else record.name
                self._waiting[kind].append(self.part(kind, value, where))
        if not any(self._waiting.values()):
            for name in sorted(self._unused):
                kind_or_none = kind_of_name(name)
                if kind_or_none is not None:
                    self._waiting[kind_or_none].append(
                        ContentPart(kind=kind_or_none, value=self._member(name))
                    )

    def part(
        self, kind: str, value: Any, name: str, settings: Mapping[str, float] | None = None
    ) -> ContentPart:
        """A medium that is named in the place where it stands.

        Args:
            kind: one of ``MEDIA_KINDS``.
            value: a path, a URI, bytes, what ``datasets`` stores, a decoded image; for a video
                also a list of these, its frames.
            name: where it stands, for errors.
            settings: of a video.

        Raises:
            InputError: it is none of these, or on the network.
        """
        if kind == "video" and isinstance(value, list | tuple) and value:
            frames = tuple(self._single("frame", one, name) for one in value)
            return ContentPart(kind=kind, value=frames, settings=settings or {})
        found = self._single(kind, value, name)
        return ContentPart(kind=kind, value=found, settings=settings or {})

    @property
    def has_waiting(self) -> bool:
        """Whether media are left that no part or mark has taken."""
        return any(self._waiting.values())

    def waiting(self, kind: str) -> int:
        """How many of this kind are left."""
        return len(self._waiting[kind])

    def images(self) -> list[Any]:
        """The images that no part or mark has taken, as the record names them."""
        return [part.value for part in self._waiting["image"]]

    def take(self, kind: str, name: str) -> ContentPart:
        """The next medium of this kind.

        Raises:
            InputError: there is none left.
        """
        if not self._waiting[kind]:
            key = self._keys.get(kind, f"{kind}s")
            raise InputError(f"{name}: <{kind}> without a file; {key!r} names too few")
        return self._waiting[kind].pop(0)

    def refuse_left(self) -> None:
        """Refuse media without a place: the model would be trained without them.

        Raises:
            InputError: there are some.
        """
        left = {
            kind: [shown(part.value) for part in parts][:4]
            for kind, parts in self._waiting.items()
            if parts
        }
        if left:
            raise InputError(
                f"{self._record.name}: no turn has a place for {left}; each medium stands as "
                "<image>, <video> or <audio> in a value"
            )
        unused = sorted(self._unused)
        if unused:
            raise InputError(
                f"{self._record.name}: {unused[:8]} lie beside the record and it names none of "
                "them; name them, or leave them out knowingly with --ignore-keys "
                f"{' '.join(unused[:8])}"
            )

    def _single(self, kind: str, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return self._named(kind, value, name)
        if isinstance(value, bytes | bytearray | memoryview):
            return EncodedMedium(data=bytes(value), name=f"{kind} of {self._record.place}")
        if isinstance(value, Mapping):
            return self._stored(kind, value, name)
        if hasattr(value, "getexif"):  # of Pillow, which is not imported for that
            return value
        raise InputError(
            f"{name}: the {kind} is {short(value)}; expected a path, bytes, or an object with "
            '"bytes" or "path"'
        )

    def _stored(self, kind: str, value: Mapping[str, Any], name: str) -> Any:
        """What the features Image, Audio and Video of ``datasets`` store."""
        given = {key: one for key, one in value.items() if one is not None}
        if "array" in given:
            raise InputError(
                f"{name}: the {kind} is decoded already; store it undecoded (datasets: "
                f"cast_column with {kind.capitalize()}(decode=False)), as bytes or a path"
            )
        data, path = given.get("bytes"), given.get("path", given.get("url"))
        known = {"bytes", "path", "url"}
        if set(given) - known or (data is None and not isinstance(path, str)):
            raise InputError(
                f"{name}: the {kind} is an object with {sorted(map(str, value))}; expected "
                '"bytes" or "path"'
            )
        if data is None:
            return self._named(kind, str(path), name)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InputError(f"{name}: the bytes of the {kind} are {short(data)}; expected bytes")
        label = path if isinstance(path, str) and path else f"{kind} of {self._record.place}"
        return EncodedMedium(data=bytes(data), name=label)

    def _named(self, kind: str, path: str, name: str) -> Path | EncodedMedium:
        if path.startswith("data:"):
            return _from_uri(path, kind, name)
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        if address := _ADDRESS.match(path):
            raise InputError(
                f"{name}: {kind} {path[: address.end() + 60]} is on the network; download it and "
                "give its path (training does not wait for servers)"
            )
        if not path.strip() or "\0" in path:
            raise InputError(f"{name}: {kind} {path[:80]!r} is no path; give that of a file")
        if self._record.members:
            ending = next((one for one in self._record.members if _is_member(path, one)), None)
            if ending is not None:
                return self._member(ending)
        return self._record.folder / path

    def _member(self, name: str) -> EncodedMedium:
        self._unused.pop(name, None)
        label = f"{self._record.place.removeprefix('key ')}.{name}"
        return EncodedMedium(data=self._record.members[name], name=label)


def _is_member(path: str, ending: str) -> bool:
    return path == ending or path.rpartition("/")[2].endswith(f".{ending}")


def _listed(value: Any) -> list[Any] | None:
    """The media under a key, as a list; None for a value that is neither a medium nor a list."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, str | bytes | Mapping) or hasattr(value, "getexif"):
        return [value]
    if isinstance(value, Sequence):
        good = all(
            isinstance(one, str | bytes | Mapping | list) or hasattr(one, "getexif")
            for one in value
        )
        return list(value) if good else None
    return None


def _from_uri(uri: str, kind: str, name: str) -> EncodedMedium:
    """The contents of a ``data:`` URI."""
    head, comma, body = uri.partition(",")
    label = f"{kind} {head[:40]}"
    if not comma:
        raise InputError(f"{name}: {kind} {uri[:40]}... is no data URI; it has no comma")
    if not head.endswith(";base64"):
        return EncodedMedium(data=unquote_to_bytes(body), name=label)
    try:
        data = base64.b64decode(unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"{name}: {label} is not valid base64: {error}; encode the file again, or give its path"
        ) from error
    return EncodedMedium(data=data, name=label)
