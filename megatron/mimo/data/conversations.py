"""Files of JSON with one record per line, or one list of them, as conversations and documents.

Paths are relative to the folder of the file. ``data/formats`` says what a record may be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.formats import RawRecord, ReadingOptions, read_record

__all__ = ["ConversationFile"]


class ConversationFile(Sequence[Conversation | Document]):
    """The conversations of one file, parsed when they are asked for.

    Args:
        path: ``.jsonl``, or ``.json`` with a list.
        options: how records are read.

    Raises:
        InputError: the file cannot be read, is not a list, or has no conversations; in
            ``__getitem__``, one that is malformed: file, line (or entry) and what is wrong.
    """

    def __init__(self, path: Path | str, *, options: ReadingOptions | None = None) -> None:
        self.path = Path(path)
        self._options = options or ReadingOptions()
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError(f"{self.path} is no regular file; expected one with conversations")
            if self.path.suffix == ".json":
                self._entries = self._read_list()
                self._lines: list[tuple[int, int]] = []
            else:
                self._entries = []
                self._lines = self._find_lines()
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
        if not len(self):
            raise InputError(f"{self.path} has no conversations; expected one per line")

    def __len__(self) -> int:
        return len(self._entries) or len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Conversation | Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation | Document]: ...
    def __getitem__(
        self, index: int | slice
    ) -> Conversation | Document | list[Conversation | Document]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._entries:
            place = range(len(self))[index]
            return self._parsed(self._entries[place], f"entry {place + 1}")
        number, offset = self._lines[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            entry = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{self.path}, line {number}: {_not_json(error)}; repair or delete it"
            ) from error
        return self._parsed(entry, f"line {number}")

    def _parsed(self, entry: Any, place: str) -> Conversation | Document:
        record = RawRecord(value=entry, file=self.path, place=place)
        return read_record(record, self._options)

    def _read_list(self) -> list[Any]:
        try:
            entries = json.loads(self.path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: not valid JSON: {error}; repair it") from error
        if not isinstance(entries, list):
            raise InputError(
                f"{self.path}: expected a list of conversations, got {type(entries).__name__}; "
                "a file with one conversation per line is called .jsonl"
            )
        return entries

    def _find_lines(self) -> list[tuple[int, int]]:
        """Number and offset of each line that is not blank."""
        lines, offset = [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append((number, offset))
                offset += len(line)
        return lines


def _not_json(error: Exception) -> str:
    """What is wrong with one line; the decoder's own words count lines from the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not valid JSON: {error}"
