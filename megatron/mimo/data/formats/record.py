"""The values between files and formats: a raw record, the options of reading, and a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.conversation import Conversation, Document
from megatron.mimo.data.media.boxes import BoxWriter

__all__ = ["Format", "RawRecord", "ReadingOptions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawRecord:
    """One record as it lies in a file; nothing of it is interpreted. Can be pickled.

    Attributes:
        value: decoded JSON, or the columns of a row. A column of media may hold a path, encoded
            bytes, or ``{"bytes": ..., "path": ...}`` as the package ``datasets`` stores them.
        file: that holds it.
        place: where in the file: "line 3", "entry 3", "row 17", "key 000012".
        members: files that lie beside the record in a tar, by what follows the key in their
            names ("jpg", "1.png"). ``tar_record`` makes the record of such a group.
        media_folder: what paths in the record are relative to; None for the folder of ``file``.
        epoch: passes over its source before this one.
    """

    value: Any
    file: Path
    place: str
    members: Mapping[str, bytes] = field(default_factory=dict)
    media_folder: Path | None = None
    epoch: int = 0

    @property
    def name(self) -> str:
        """Says where it is from, in messages."""
        return f"{self.file}, {self.place}"

    @property
    def folder(self) -> Path:
        """What its paths are relative to."""
        return self.file.parent if self.media_folder is None else self.media_folder


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How records are read; the flags of the same names.

    Attributes:
        data_format: name of the format; None tells it from each record.
        ignored: keys that are left out of every record, whatever they mean.
        learn: "all" turns of the assistant's, or the "last" one alone.
        thinking: what stands in ``<think>`` is learned ("keep"), stands in the text and is not
            learned ("context"), or is left out of it ("drop").
        boxes: writes boxes of objects in the model's units; None writes them as they stand.
        media_folder: what paths in records are relative to; None for the folder of their file.

    Raises:
        ConfigError: other words.
    """

    data_format: str | None = None
    ignored: frozenset[str] = frozenset()
    learn: str = "all"
    thinking: str = "keep"
    boxes: BoxWriter | None = None
    media_folder: Path | None = None

    def __post_init__(self) -> None:
        for name, expected in (
            ("learn", ("all", "last")),
            ("thinking", ("keep", "context", "drop")),
        ):
            if getattr(self, name) not in expected:
                raise ConfigError(
                    f"--{name} is {getattr(self, name)!r}; expected {' or '.join(expected)}"
                )


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way in which people write down conversations or documents.

    Attributes:
        name: what ``--data-format`` takes.
        summary: its keys, in one line, for errors and the documentation.
        recognises: whether a record, an object, has the keys of this format; opens no medium.
        read: interprets the record: media are named, not opened. Raises ``InputError`` where it
            is malformed or says something that would not be honoured; the message begins with the
            record's name.
    """

    name: str
    summary: str
    recognises: Callable[[RawRecord], bool]
    read: Callable[[RawRecord, ReadingOptions], Conversation | Document]
