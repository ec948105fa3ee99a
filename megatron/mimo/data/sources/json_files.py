"""JSON Lines and JSON lists, compressed or not, by an index of where each record lies.

A compressed file, which cannot be read from the middle, is unpacked once into its index's folder.
"""

from __future__ import annotations

import gzip
import json
import mmap
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.sources.index import Arrays, GrowingColumn, index_place, indexed
from megatron.mimo.data.sources.record_file import ByteReader

__all__ = ["JsonRecords", "not_json", "open_json"]

_BLOCK = 1 << 24  # bytes that are looked at together
_SHORT = 8  # bytes; a line up to this long may be blank
_UNPACKED = "unpacked"
_HEAD = 1 << 16  # bytes that are looked at to tell lines from a list
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# one token of JSON that matters for where a list's entries end: strings are passed over whole
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)


def open_json(path: Path, index_folder: Path) -> JsonRecords:
    """The records of a file: one a line, or the entries of a list, whatever its name ends with.

    Raises:
        InputError: it is neither.
    """
    head = _head(path)
    if head.startswith(_UTF16_MARKS):
        raise InputError(f"{path} is UTF-16; expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")
    head = head.removeprefix(_UTF8_MARK).lstrip()
    first, _, rest = head.partition(b"\n")
    if head.startswith(b"[") and not (rest.strip() and _is_json(first)):
        return JsonRecords(path, index_folder, "list")
    if rest and first.strip() == b"{":
        raise InputError(
            f"{path}: expected a list of records, or one record per line, got one object over "
            "several lines; take the list out of it, or put the object between [ and ]"
        )
    return JsonRecords(path, index_folder, "lines")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _head(path: Path) -> bytes:
    if path.suffix not in (".gz", ".zst"):
        with path.open("rb") as file:
            return file.read(_HEAD)
    with _damage_named(path), _unpacking(path) as packed:
        head: bytes = packed.read(_HEAD)
        return head


class JsonRecords:
    """The records of a file, also of ``.gz`` and ``.zst``: its lines, or the entries of one list.

    Args:
        path: of the file.
        index_folder: of all indexes.
        kind: "lines" (blank ones are passed over) or "list".
    """

    def __init__(self, path: Path, index_folder: Path, kind: Literal["lines", "list"]) -> None:
        self.path = path
        build, self._what = (_index_list, "entry") if kind == "list" else (_index_lines, "line")
        arrays = indexed(path, kind, index_folder, partial(build, path))
        self._starts, self._sizes = arrays["starts"], arrays["sizes"]
        none = np.zeros(0, np.int64)
        self._numbers = arrays.get("numbers", none)  # of lines, from 1; empty where none is blank
        unpacked = index_place(path, kind, index_folder) / _UNPACKED
        self._bytes = ByteReader(unpacked if unpacked.is_file() else path)

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One: any record is read as fast as any other."""
        return [len(self)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> RawRecord:
        place = int(self._numbers[number]) if len(self._numbers) else number + 1
        data = self._bytes.read(int(self._starts[number]), int(self._sizes[number]))
        where = f"{self._what} {place}"
        return RawRecord(value=_decoded(data, self.path, where), file=self.path, place=where)


def not_json(error: Exception) -> str:
    """What is wrong with one record; the decoder's own words count lines from the record."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not valid JSON: {error}"


def _decoded(data: bytes, path: Path, place: str) -> Any:
    try:
        return json.loads(data.rstrip())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, {place}: {not_json(error)}; repair or delete it") from error


def _index_lines(path: Path, folder: Path) -> Arrays:
    """Where each line that is not blank begins, its size without the line's end, its number."""
    names = ("starts", "sizes", "numbers")
    starts, sizes, numbers = (GrowingColumn(folder, name) for name in names)
    at, line, has_blank, rest = 0, 1, False, b""
    with _plain(path, folder) as file:
        while block := file.read(_BLOCK):
            data = rest + block
            ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10).astype(np.int64)
            base = at - len(rest)  # where data lies in the file
            at += len(block)
            if not len(ends):
                rest = data
                continue
            first = np.concatenate([[0], ends[:-1] + 1])
            keep = _not_blank(data, first, ends)
            starts.add((first + base)[keep])
            sizes.add((ends - first)[keep])
            numbers.add(np.arange(line, line + len(ends))[keep])
            has_blank |= not keep.all()
            line += len(ends)
            rest = data[int(ends[-1]) + 1 :]
    if rest.strip():
        starts.add(np.array([at - len(rest)]))
        sizes.add(np.array([len(rest)]))
        numbers.add(np.array([line]))
    starts.finish()
    sizes.finish()
    numbers.finish(empty=not has_blank)
    return {}


def _not_blank(data: bytes, first: np.ndarray, ends: np.ndarray) -> np.ndarray:
    keep = np.ones(len(first), dtype=bool)
    for number in np.flatnonzero(ends - first <= _SHORT):
        keep[number] = bool(data[first[number] : ends[number]].strip())
    # longer ones that begin with white space may be blank, too
    lead = np.frombuffer(data, dtype=np.uint8)[first]
    for number in np.flatnonzero(np.isin(lead, list(b" \t\r")) & keep):
        keep[number] = bool(data[first[number] : ends[number]].strip())
    return keep


def _index_list(path: Path, folder: Path) -> Arrays:
    """Where each entry of the outermost list begins, and its size."""
    with _plain(path, folder) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return _entries(path, data)
        finally:
            data.close()


def _entries(path: Path, data: mmap.mmap) -> Arrays:
    starts, sizes = array("q"), array("q")
    depth, begin, end = 0, 0, None
    for token in _TOKEN.finditer(data):
        kind = token[0]
        if kind == b"[" and depth == 0:
            begin = token.end()
            depth = 1
        elif kind in (b"[", b"{"):
            depth += 1
        elif kind in (b"]", b"}"):
            depth -= 1
        if kind in (b",", b"]") and depth == (1 if kind == b"," else 0):
            entry = data[begin : token.start()]
            if entry.strip():
                starts.append(begin)
                sizes.append(token.start() - begin)
            elif kind == b"," or starts:
                raise _broken(path, len(starts) + 1, "there is nothing between two commas")
            begin = token.end()
        if depth == 0:
            end = token.end()
            break
    if end is None:
        raise _broken(path, len(starts) + 1, "the file ends before the list does")
    if data[end:].strip():
        raise _broken(path, len(starts), "text follows the list")
    return {"starts": np.frombuffer(starts, np.int64), "sizes": np.frombuffer(sizes, np.int64)}


def _broken(path: Path, entry: int, why: str) -> InputError:
    return InputError(f"{path}: not valid JSON at entry {entry}: {why}; repair it")


@contextmanager
def _plain(path: Path, folder: Path) -> Iterator[IO[bytes]]:
    """The content without compression, in a file that can be entered anywhere."""
    if path.suffix not in (".gz", ".zst"):
        with path.open("rb") as file:
            yield file
        return
    target = folder / _UNPACKED
    with _damage_named(path), _unpacking(path) as packed, target.open("wb") as out:
        while block := packed.read(_BLOCK):
            out.write(block)
    with target.open("rb") as file:
        yield file


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
        raise InputError(
            f"{path} cannot be unpacked: {error}; it is damaged or cut off: copy it again"
        ) from error


def _unpacking(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{path} is compressed with Zstandard, which needs a package: "
            "pip install 'megatron-mimo[data]'"
        ) from error
    return zstandard.open(path, "rb")


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return gzip.BadGzipFile
    error: type[Exception] = zstandard.ZstdError
    return error
