"""Media under other keys than ``image``, ``video`` and ``audio``, or by marks, in standard form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import MEDIA_KINDS
from megatron.mimo.data.formats.keys import short
from megatron.mimo.data.formats.record import RawRecord
from megatron.mimo.data.formats.record_media import kind_of_name

__all__ = ["with_columns", "with_plain_marks"]

_PATHS = {
    **{f"{kind}_{what}": kind for kind in MEDIA_KINDS for what in ("path", "file")},
    **dict.fromkeys(("img", "img_path", "imgname"), "image"),
}
_MARK = re.compile(r"<image(?:_\d+)?>")
_FILE_NAME = "file_name"  # of ``metadata.jsonl`` in folders of images or recordings


def with_columns(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record's value with its media under the keys that formats know.

    A key stays as it is where the record names media of its kind already.
    """
    found = {key: kind for key, kind in _PATHS.items() if value.get(key)}
    name = value.get(_FILE_NAME)
    if isinstance(name, str) and (kind := kind_of_name(name)) is not None:
        found[_FILE_NAME] = kind
    there = {kind for kind in MEDIA_KINDS if value.get(kind) or value.get(f"{kind}s")}
    moved = {key: kind for key, kind in found.items() if kind not in there}
    if not moved or len(set(moved.values())) < len(moved):  # of two it cannot be told which counts
        return value
    kept = {key: one for key, one in value.items() if key not in moved}
    return kept | {kind: value[key] for key, kind in moved.items()}


def with_plain_marks(record: RawRecord, turns: Sequence[Any]) -> tuple[RawRecord, Sequence[Any]]:
    """Images by the marks that stand for them, ``{"<image_00>": "a.png"}`` (MiniCPM-V), as a list
    in the order of the marks, which become ``<image>``; another record and its turns as they are.

    Raises:
        InputError: a mark has no image.
    """
    images = record.value.get("image")
    if not isinstance(images, Mapping) or not all(map(_MARK.fullmatch, map(str, images))):
        return record, turns
    found: list[Any] = []
    named = set()

    def plain(mark: re.Match[str]) -> str:
        if mark[0] not in images:
            raise InputError(
                f"{record.name}: {mark[0]} without a file; 'image' has {short(list(images))}"
            )
        found.append(images[mark[0]])
        named.add(mark[0])
        return "<image>"

    written = [
        {
            key: _MARK.sub(plain, text)
            if key in ("value", "content") and isinstance(text, str)
            else text
            for key, text in turn.items()
        }
        if isinstance(turn, Mapping)
        else turn
        for turn in turns
    ]
    left = [image for mark, image in images.items() if mark not in named]
    return replace(record, value={**record.value, "image": [*found, *left]}), written
