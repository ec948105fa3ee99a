"""Groups of files in a tar that share a key, as WebDataset writes them, as one record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats.record import RawRecord

__all__ = ["TEXTS", "tar_record"]

TEXTS = ("txt", "text", "caption", "cap")


def tar_record(key: str, members: Mapping[str, bytes], file: Path) -> RawRecord:
    """The record of one group: its JSON, or its text, and its other members as media.

    Args:
        key: what the names of its files have in common.
        members: contents, by what follows the key and a dot ("json", "jpg", "1.png").
        file: the tar.

    Raises:
        InputError: its JSON or its text cannot be decoded.
    """
    place = f"key {key}"
    media, value = dict(members), dict[str, Any]()
    data = media.pop("json", None)
    if data is not None:
        try:
            decoded = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}, {place}: {key}.json is not valid JSON: {error}; repair or delete it"
            ) from error
        if not isinstance(decoded, dict):
            decoded = {_turns_key(decoded): decoded}
        value.update(decoded)
    for name in TEXTS:
        text = media.pop(name, None)
        if text is not None:
            try:
                value.setdefault("text", text.decode())
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file}, {place}: {key}.{name} is not UTF-8: {error.reason} at byte "
                    f"{error.start}; convert it"
                ) from error
    return RawRecord(value=value, file=file, place=place, members=media)


def _turns_key(turns: Any) -> str:
    """Under which key formats know a list of turns."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return "conversations" if isinstance(first, Mapping) and "from" in first else "messages"
