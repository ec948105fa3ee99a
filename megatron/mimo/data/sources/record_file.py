"""What a file of records is, whatever its kind: a sequence of raw records with random access."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron.mimo.data.formats import RawRecord

__all__ = ["ByteReader", "RecordFile"]


class RecordFile(Protocol):
    """The records of one file, by number.

    It may be handed to other processes (by fork or pickle) at any time: what has to be opened is
    opened in each.

    Attributes:
        path: of the file.
    """

    path: Path

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Records of each piece that is best read in order, such as a parquet file's row groups."""
        ...

    def __len__(self) -> int:
        """Records."""
        ...

    def __getitem__(self, number: int) -> RawRecord:
        """Record ``number``, from 0.

        Raises:
            InputError: it cannot be decoded; the message begins with file and place.
        """
        ...


class ByteReader:
    """Bytes of a file by offset; nothing is shared between processes, not even a position."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``, or fewer at the end of the file."""
        if self._handle is None:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._handle, size, start)

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_handle": None}

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
