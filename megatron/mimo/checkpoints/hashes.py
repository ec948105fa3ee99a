"""A hash of every file of a checkpoint: written when it is saved, compared when it is opened.

The hash is CRC-32. What it is for is flipped bits and lost blocks, not a forger: it sees every
change within 32 neighbouring bits, and misses one of 4 billion others. zlib's takes about 2 GB/s
of one core, twice what SHA-256 takes (``benchmarks/checkpoint_hashes.py``).
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Buffer, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

__all__ = [
    "MANIFEST",
    "FileHash",
    "HashedWrites",
    "ManifestError",
    "first_change",
    "hash_files",
    "list_files",
    "read_manifest",
    "share",
    "write_manifest",
    "written_by",
]

MANIFEST = "hashes.json"
_ALGORITHM = "crc32"
_BLOCK = 8 * 2**20  # bytes that are read at once
_THREADS = 8  # at most
_WRITTEN_BY = re.compile(r"__([0-9]+)_[0-9]+\.distcp$")  # the rank that writes a file


class ManifestError(ValueError):
    """A manifest that is there and cannot be read."""


@dataclass(frozen=True, kw_only=True)
class FileHash:
    """What a file held when it was written.

    Attributes:
        size: in bytes.
        hash: eight hexadecimal digits.
    """

    size: int
    hash: str


def list_files(folder: Path, *, manifest: str = MANIFEST) -> list[str]:
    """The files in a folder and below, but for its manifest; relative, sorted."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if name != manifest and not name.startswith(f".{manifest}") and path.is_file():
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


class HashedWrites:
    """A file that is written from its start to its end, and hashed on the way.

    Args:
        file: new, open for writing.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size = 0
        self._file = file
        self._value = 0

    def write(self, data: Buffer) -> int:
        """Write all of it."""
        self._file.write(data)
        self._value = zlib.crc32(data, self._value)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Nothing: the file is flushed by who has opened it."""

    @property
    def hash(self) -> FileHash:
        """Of all that was written so far."""
        return FileHash(size=self.size, hash=f"{self._value:08x}")


def written_by(name: str) -> int | None:
    """The rank that writes a file, by its name; None where the name does not say."""
    found = _WRITTEN_BY.search(name)
    return int(found[1]) if found else None


def share(names: Sequence[str], *, rank: int, size: int) -> list[str]:
    """The files that one of ``size`` ranks reads: those it writes itself, and some of the others.

    Args:
        names: of all files, in the same order on every rank.
        rank: of this process.
        size: how many ranks there are.
    """
    mine = []
    for number, name in enumerate(names):
        writer = written_by(name)
        if (number if writer is None else writer) % size == rank:
            mine.append(name)
    return mine


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileHash]:
    """Read files, several at a time.

    Raises:
        OSError: one cannot be read.
    """
    names = list(names)
    threads = max(1, min(_THREADS, _cores(), len(names)))
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda name: _hash_file(folder / name), names)
        return dict(zip(names, hashes, strict=True))


def first_change(
    folder: Path, manifest: Mapping[str, FileHash], names: Iterable[str] | None = None
) -> str | None:
    """What differs first between files and what the manifest says of them; None where nothing.

    Args:
        folder: the checkpoint's.
        manifest: as ``read_manifest`` gives it.
        names: of the files whose bytes are read; by default of none: then that all are there, in
            their sizes, is all that is looked for.
    """
    for name, expected in manifest.items() if names is None else ():
        path = folder / name
        if not path.is_file():
            return f"{name} is not a file" if os.path.lexists(path) else f"{name} is missing"
        actual = path.stat().st_size
        if actual < expected.size:
            return f"{name} has {actual} bytes, expected {expected.size}: it is cut off"
        if actual > expected.size:
            return f"{name} has {actual} bytes, expected {expected.size}"
    try:
        found = hash_files(folder, names or ())
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read: {error.strerror}"
    for name, actually in found.items():
        if actually.hash != manifest[name].hash:
            return (
                f"{name} has the hash {actually.hash}, expected {manifest[name].hash}: its bytes "
                "have changed since it was written"
            )
    return None


def write_manifest(
    folder: Path, files: Mapping[str, FileHash], *, manifest: str = MANIFEST
) -> None:
    """Write the hashes of all files beside them, as ``manifest``; readers see all or nothing."""
    content = {
        "algorithm": _ALGORITHM,
        "files": {
            name: {"size": one.size, "hash": one.hash} for name, one in sorted(files.items())
        },
    }
    fresh = folder / f".{manifest}.new"
    with fresh.open("w") as file:
        json.dump(content, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / manifest)


def read_manifest(folder: Path, *, manifest: str = MANIFEST) -> dict[str, FileHash] | None:
    """What ``write_manifest`` wrote; None for a folder without.

    Raises:
        ManifestError: it is damaged.
    """
    path = folder / manifest
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ManifestError(f"{manifest} is not a file")
    try:
        content = json.loads(path.read_bytes())
        files = {
            _inside(name): FileHash(size=int(one["size"]), hash=str(one["hash"]))
            for name, one in content["files"].items()
        }
        algorithm = content["algorithm"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"{manifest} cannot be read: {type(error).__name__}: {str(error)[:100]}"
        ) from error
    if algorithm != _ALGORITHM:
        raise ManifestError(f"{manifest} has hashes of {algorithm!r}, expected {_ALGORITHM!r}")
    return files


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"it names the file {name!r}, expected one beside it")
    return name


def _hash_file(path: Path) -> FileHash:
    value, size = 0, 0
    with path.open("rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(max(1, min(length, _BLOCK))))  # cleared, which takes time
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
            size += count
    return FileHash(size=size, hash=f"{value:08x}")


def _cores() -> int:
    """What this rank may use of its host."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return here // max(1, int(ranks) if ranks.isdigit() else 1)
