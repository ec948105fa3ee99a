"""Rows of media on disk, by key: written once, by whichever process is first, and memory-mapped.

A folder holds segments. A writer appends rows to a segment of its own, and then a record to the
segment's index: key, place, shape and checksums. A process that is killed leaves at most rows
without a record, or a part of a record, which readers pass over. Writers look at each other's
records under a lock of the folder before they write, so that no medium is written twice.

Legend: N rows of a medium, H features.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["KEY_BYTES", "RowCache"]

KEY_BYTES = 16
_RECORD = struct.Struct(
    f"<{KEY_BYTES}sQIIIII"
)  # key, start, tensors, N, H, checksums: rows, record
_PAUSE = 5.0  # seconds between readings of what other processes have written


class _Place(NamedTuple):
    segment: int
    start: int
    shape: tuple[int, int, int]
    checksum: int


class RowCache:
    """Rows by key.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._places: dict[bytes, _Place] = {}
        self._segments: list[Path] = []
        self._read: dict[Path, int] = {}  # bytes of each index that are known
        self._maps: dict[int, np.ndarray] = {}
        self._looked = 0.0
        self._own: tuple[int, int, int] | None = None  # process, rows' file, index's file
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Read the records that have been written since the last call."""
        self._looked = time.monotonic()
        for index in sorted(self.folder.glob("*.index")):
            known = self._read.get(index, 0)
            if index.stat().st_size - known >= _RECORD.size:
                self._learn(index, known)

    def get(self, key: bytes) -> Tensor | None:
        """The rows of a medium, bfloat16 [tensors, N, H]; None where they are missing or damaged.

        Rows that other processes write are seen within some seconds.
        """
        place = self._places.get(key)
        if place is None and time.monotonic() - self._looked > _PAUSE:
            self.refresh()
            place = self._places.get(key)
        if place is None:
            return None
        size = 2 * int(np.prod(place.shape))
        data = self._mapped(place.segment, place.start + size)[place.start : place.start + size]
        if len(data) < size or zlib.crc32(data) != place.checksum:
            del self._places[key]  # it is written again
            return None
        rows = torch.from_numpy(np.array(data)).view(torch.bfloat16)
        return rows.view(place.shape)

    def put(self, rows: Mapping[bytes, Tensor]) -> int:
        """Write rows, bfloat16 [tensors, N, H] on the host, of media that nobody has written yet.

        Returns:
            How many were written.
        """
        with self._locked():
            self.refresh()
            new = {key: value for key, value in rows.items() if key not in self._places}
            for key, value in new.items():
                self._append(key, value)
            if new:
                self.refresh()
        return len(new)

    def _learn(self, index: Path, known: int) -> None:
        data = index.read_bytes()[known:]
        segment = index.with_suffix(".rows")
        if segment not in self._segments:
            self._segments.append(segment)
        number = self._segments.index(segment)
        for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
            record = data[at : at + _RECORD.size]
            key, start, tensors, count, width, checksum, own = _RECORD.unpack(record)
            if zlib.crc32(record[:-4]) != own:
                break
            shape = (tensors, count, width)
            self._places.setdefault(key, _Place(number, start, shape, checksum))
            known += _RECORD.size
        self._read[index] = known

    def _mapped(self, segment: int, end: int) -> np.ndarray:
        found = self._maps.get(segment)
        if found is None or len(found) < end:
            path = self._segments[segment]
            empty = not path.exists() or not path.stat().st_size
            found = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
            self._maps[segment] = found
        return found

    def _append(self, key: bytes, rows: Tensor) -> None:
        if self._own is None or self._own[0] != os.getpid():
            name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            files = [os.open(self.folder / f"{name}.{end}", flags) for end in ("rows", "index")]
            self._own = os.getpid(), files[0], files[1]
        _, data_file, index_file = self._own
        data = rows.contiguous().view(torch.uint8).numpy().tobytes()
        start = os.fstat(data_file).st_size
        _write(data_file, data)
        record = _RECORD.pack(key, start, *rows.shape, zlib.crc32(data), 0)[:-4]
        _write(index_file, record + struct.pack("<I", zlib.crc32(record)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel takes it from a process that dies
            yield
        finally:
            os.close(handle)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
