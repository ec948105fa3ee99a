"""Tars as WebDataset writes them: files that share a key are one record.

An index of the members is made the first time a tar is reached, from its headers alone; from then
on a record's members are read by offset, and nothing else of the tar is.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats import RawRecord, tar_record
from megatron.mimo.data.sources.index import Arrays, index_place, indexed
from megatron.mimo.data.sources.record_file import ByteReader

__all__ = ["TarRecords"]

_UNPACKED = "unpacked"
_BLOCK = 1 << 24


class TarRecords:
    """The records of a tar, ``.tar`` or ``.tar.gz``; a compressed one is unpacked once."""

    def __init__(self, path: Path, index_folder: Path) -> None:
        self.path = path
        arrays = indexed(path, "tar", index_folder, partial(_index_tar, path))
        self._firsts = arrays["firsts"]  # member of each record, and their number
        self._starts, self._sizes = arrays["starts"], arrays["sizes"]
        self._names, self._ends = arrays["names"], arrays["name_ends"]
        unpacked = index_place(path, "tar", index_folder) / _UNPACKED
        self._bytes = ByteReader(unpacked if unpacked.is_file() else path)

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One: a tar is read from its beginning to its end."""
        return [len(self)]

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, number: int) -> RawRecord:
        members: dict[str, bytes] = {}
        key = ""
        for member in range(int(self._firsts[number]), int(self._firsts[number + 1])):
            begin = int(self._ends[member - 1]) if member else 0
            name = bytes(self._names[begin : int(self._ends[member])]).decode()
            key, ending = split_key(name)
            members[ending] = self._bytes.read(int(self._starts[member]), int(self._sizes[member]))
        return tar_record(key, members, self.path)


def split_key(name: str) -> tuple[str, str]:
    """The key of a member's name, folders included, and what follows it and a dot."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending


def _index_tar(path: Path, folder: Path) -> Arrays:
    plain = path
    if path.name.endswith((".tar.gz", ".tgz")):
        plain = folder / _UNPACKED
        _unpack(path, plain)
    firsts: list[int] = []
    starts: list[int] = []
    sizes: list[int] = []
    names: list[bytes] = []
    last, seen = None, set[str]()
    try:
        with tarfile.open(plain, "r:") as tar:
            for member in tar:
                key, ending = split_key(member.name)
                if not member.isfile() or not ending or not key.rpartition("/")[2]:
                    _forget(tar)
                    continue
                if key != last:
                    firsts.append(len(starts))
                    last, seen = key, set()
                if ending in seen:
                    raise InputError(
                        f"{path}, key {key}: has two members {ending!r}; a key may have one of "
                        "each: write the tar again"
                    )
                seen.add(ending)
                starts.append(member.offset_data)
                sizes.append(member.size)
                names.append(member.name.encode())
                _forget(tar)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as a tar: {error}; it is damaged or cut off: copy it again"
        ) from error
    _check_end(path, plain, end)
    return {
        "firsts": np.array([*firsts, len(starts)], np.int64),
        "starts": np.array(starts, np.int64),
        "sizes": np.array(sizes, np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }


def _forget(tar: tarfile.TarFile) -> None:
    """Drop what a tar's reader remembers of the members it has passed, or memory grows."""
    tar.members.clear()  # type: ignore[attr-defined]  # it is there, and has no type


def _check_end(path: Path, plain: Path, end: int) -> None:
    """Refuse a tar that goes on, or is cut off, where its reader has stopped without a word."""
    block = ByteReader(plain).read(end, 512)
    if end > plain.stat().st_size or 0 < len(block) < 512:
        raise InputError(f"{path} is cut off at byte {plain.stat().st_size}; copy it again")
    if block.strip(b"\0"):
        raise InputError(f"{path} is damaged at byte {end}: no header of a member; copy it again")


def _unpack(path: Path, target: Path) -> None:
    try:
        with gzip.open(path, "rb") as packed, target.open("wb") as out:
            while block := packed.read(_BLOCK):
                out.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be unpacked: {error}; it is damaged or cut off: copy it again"
        ) from error
