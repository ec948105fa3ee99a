"""Indexes of files: where each record begins, worked out once and memory-mapped from then on.

An index is a folder of ``.npy`` arrays, named after the file's path, size and time of change, so
that a file that has changed gets a new one. It is written beside its place and moved there when it
is whole: several processes may write it at a time, and none reads a part.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.errors import InputError

__all__ = ["GrowingColumn", "default_index_folder", "index_place", "indexed"]

_DONE = "done"  # a file that is there once all others are
_VERSION = 1  # of the content
_COPIED = 1 << 24  # bytes at a time

Arrays = Mapping[str, np.ndarray]


class GrowingColumn:
    """An array of int64 that grows on disk while an index is built, whatever its length.

    Args:
        folder: of the index that is being built.
        name: of the array.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.npy"
        self._raw = folder / f"{name}.raw"
        self._file = self._raw.open("wb")
        self._count = 0

    def add(self, values: np.ndarray) -> None:
        """Append."""
        self._file.write(values.astype(np.int64).tobytes())
        self._count += len(values)

    def finish(self, *, empty: bool = False) -> None:
        """Put the array into the index; without what was added, if it is to be ``empty``."""
        self._file.close()
        count = 0 if empty else self._count
        with self._path.open("wb") as out, self._raw.open("rb") as raw:
            header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(out, header)
            if count:
                shutil.copyfileobj(raw, out, _COPIED)
        self._raw.unlink()


def default_index_folder() -> Path:
    """Where indexes lie unless ``--index-folder`` says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron-mimo" / "index"


def index_place(path: Path, kind: str, folder: Path) -> Path:
    """The folder of a file's index.

    Args:
        path: of the file.
        kind: which index, where a file may have several.
        folder: of all indexes.

    Raises:
        InputError: there is no such file.
    """
    try:
        real = path.resolve(strict=True)
        found = real.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; correct the path") from error
    named = f"{_VERSION} {kind} {real} {found.st_size} {found.st_mtime_ns}"
    return folder / f"{path.name}.{hashlib.sha256(named.encode()).hexdigest()[:24]}"


def indexed(
    path: Path, kind: str, folder: Path, build: Callable[[Path], Arrays]
) -> dict[str, np.ndarray]:
    """The arrays of a file's index, memory-mapped; built first where there are none.

    Args:
        path: of the file.
        kind: which index, where a file may have several.
        folder: of all indexes.
        build: gets the folder of the index that is being built, where it may leave further files
            and ``GrowingColumn``s, and returns the other arrays by name.

    Raises:
        InputError: the file cannot be read, or the index cannot be written.
    """
    place = index_place(path, kind, folder)
    if not (place / _DONE).is_file():
        _build(path, place, build)
    return {file.stem: np.load(file, mmap_mode="r") for file in sorted(place.glob("*.npy"))}


def _build(path: Path, place: Path, build: Callable[[Path], Arrays]) -> None:
    fresh: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        for name, array in build(fresh).items():
            np.save(fresh / f"{name}.npy", array)
        (fresh / _DONE).touch()
        try:
            fresh.rename(place)
        except OSError:  # another process was first
            if not (place / _DONE).is_file():
                raise
    except OSError as error:
        raise InputError(
            f"the index of {path} cannot be written to {place.parent}: {error.strerror}; name "
            "another folder with --index-folder"
        ) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
