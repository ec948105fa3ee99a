"""The field map of a prepared Energon dataset: which member of a sample each field is.

    field_map: {image: "jpg,png", context: "json[question]", answers: "json[answers][0]"}

A field is a member, named by its ending, or a value within a member that is JSON, by keys of
objects and numbers of lists. Of alternatives, separated by commas, the first that exists counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats.keys import short
from megatron.mimo.data.formats.record import RawRecord
from megatron.mimo.data.formats.record_media import kind_of_name
from megatron.mimo.data.formats.tar_members import TEXTS

__all__ = ["FieldMap", "field_map"]

_FIELD = re.compile(r"([^\[\],]+)((?:\[[^\[\],]+\])*)")


@dataclass(frozen=True)
class FieldMap:
    """Fields of a record, and the places of each: a member and the steps within it."""

    places: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]

    def record(self, key: str, members: Mapping[str, bytes], file: Path) -> RawRecord:
        """The record of one sample.

        Args:
            key: what the names of its files have in common.
            members: contents, by what follows the key and a dot.
            file: where it lies.

        Raises:
            InputError: a field is nowhere, or a member cannot be decoded.
        """
        where = f"{file}, key {key}"
        decoded: dict[str, Any] = {}
        value = {field: self._found(field, members, decoded, where) for field in self.places}
        return RawRecord(value=value, file=file, place=f"key {key}", members={})

    def _found(
        self, field: str, members: Mapping[str, bytes], decoded: dict[str, Any], where: str
    ) -> Any:
        for member, steps in self.places[field]:
            if member not in members:
                continue
            if member not in decoded:
                decoded[member] = _decoded(member, members[member], where)
            value = decoded[member]
            try:
                for step in steps:
                    value = value[int(step) if isinstance(value, list) else step]
            except (KeyError, ValueError, IndexError, TypeError):
                continue
            return value
        asked = ", ".join(
            member + "".join(f"[{one}]" for one in steps) for member, steps in self.places[field]
        )
        raise InputError(
            f"{where}: no {field!r}, which field_map in dataset.yaml finds in {asked}; the sample "
            f"has {sorted(members)}"
        )


def field_map(described: Any, where: str) -> FieldMap:
    """From what ``dataset.yaml`` has under ``field_map``.

    Raises:
        InputError: it is none.
    """
    if not isinstance(described, Mapping) or not described:
        raise InputError(f"{where}: field_map is {short(described)}; expected fields and members")
    places = {}
    for field, text in described.items():
        parts = str(text).split(",")
        found = [_FIELD.fullmatch(part) for part in parts]
        if not isinstance(text, str) or not all(found):
            raise InputError(
                f"{where}: field_map gives {field} as {short(text)}; expected members such as "
                "'jpg' or 'json[question]', with commas between alternatives"
            )
        places[str(field)] = tuple(
            (one[1], tuple(one[2][1:-1].split("][")) if one[2] else ()) for one in found if one
        )
    return FieldMap(places)


def _decoded(member: str, data: bytes, where: str) -> Any:
    ending = member.rpartition(".")[2].lower()
    try:
        if ending == "json":
            return json.loads(data)
        if ending in TEXTS:
            return data.decode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its {member} cannot be decoded: {error}; repair it") from error
    if kind_of_name(member) is not None:
        return data
    raise InputError(
        f"{where}: field_map names {member}, which is neither JSON, text nor a medium; leave it "
        "out of field_map"
    )
