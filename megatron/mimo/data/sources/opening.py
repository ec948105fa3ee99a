"""From what stands on the command line to files of records."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.sources.columns import ArrowRows, ParquetRows, saved_dataset_files
from megatron.mimo.data.sources.energon import ENERGON_FOLDER, EnergonRecords
from megatron.mimo.data.sources.json_files import JsonLines, JsonList
from megatron.mimo.data.sources.record_file import RecordFile
from megatron.mimo.data.sources.tars import TarRecords

__all__ = ["files_of", "is_read_in_order", "open_file"]

_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_LISTS = (".json", ".json.gz", ".json.zst")
_TARS = (".tar", ".tar.gz", ".tgz")
_KNOWN = (*_LINES, *_LISTS, *_TARS, ".parquet", ".arrow")


def files_of(paths: Iterable[Path | str]) -> list[Path]:
    """The files that paths name: files, patterns (``shards/*.tar``), folders.

    A folder may be one saved by ``datasets``, a prepared Energon dataset, or hold files of records
    (those whose names do not begin with a dot are taken, in the order of their names).

    Raises:
        InputError: nothing is there, or nothing that is read.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.exists() and glob.has_magic(str(given)):
            found = [Path(one) for one in sorted(glob.glob(str(given), recursive=True))]
            if not found:
                raise InputError(f"{given} matches no file; correct the pattern")
            files += files_of(found)
        elif path.is_dir():
            files += _files_in(path)
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise InputError(f"{path} is no regular file; expected one with records")
        else:
            raise InputError(f"{path} cannot be read: No such file or directory; correct the path")
    return files


def open_file(path: Path, index_folder: Path) -> RecordFile:
    """The records of a file, told by the end of its name; other names are read as JSON Lines.

    Raises:
        InputError: it cannot be read.
    """
    name = path.name.lower()
    if path.is_dir():
        return EnergonRecords(path)
    if name.endswith(_LISTS):
        return JsonList(path, index_folder)
    if name.endswith(".parquet"):
        return ParquetRows(path)
    if name.endswith(".arrow"):
        return ArrowRows(path)
    if name.endswith(_TARS):
        return TarRecords(path, index_folder)
    return JsonLines(path, index_folder)


def is_read_in_order(path: Path) -> bool:
    """Whether a file is meant to be read from beginning to end: tars, parquet, Energon."""
    return path.is_dir() or path.name.lower().endswith((*_TARS, ".parquet"))


def _files_in(folder: Path) -> list[Path]:
    if (folder / ENERGON_FOLDER).is_dir():
        return [folder]
    saved = saved_dataset_files(folder)
    if saved is not None:
        return saved
    found = [
        one
        for one in sorted(folder.iterdir())
        if one.is_file() and one.name.lower().endswith(_KNOWN) and not one.name.startswith(".")
    ]
    if not found:
        raise InputError(
            f"{folder} holds no file of records; expected {', '.join(_KNOWN)}, a folder saved by "
            "datasets, or a prepared Energon dataset"
        )
    return found
