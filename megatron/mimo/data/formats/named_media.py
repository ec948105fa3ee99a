"""Media under other names than ``image``, ``video`` and ``audio``: paths, names of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mimo.data.conversation import MEDIA_KINDS
from megatron.mimo.data.formats.record_media import kind_of_name

__all__ = ["with_columns"]

_PATHS = {
    **{f"{kind}_{what}": kind for kind in MEDIA_KINDS for what in ("path", "file")},
    **dict.fromkeys(("img", "img_path"), "image"),
}
_FILE_NAME = "file_name"  # of ``metadata.jsonl`` in folders of images or recordings


def with_columns(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record whose media stand under the keys that formats know.

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
