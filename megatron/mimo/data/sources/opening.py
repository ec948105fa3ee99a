"""Finds the files that paths and patterns name, and opens them by their kind."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.sources.columns import ArrowRows, ParquetRows, saved_dataset_files
from megatron.mimo.data.sources.energon import ENERGON_FOLDER, EnergonRecords
from megatron.mimo.data.sources.json_files import open_json
from megatron.mimo.data.sources.record_file import RecordFile
from megatron.mimo.data.sources.tars import TarRecords

__all__ = ["files_of", "is_read_in_order", "open_file"]

_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_LISTS = (".json", ".json.gz", ".json.zst")
_TARS = (".tar", ".tar.gz", ".tgz")
_KNOWN = (*_LINES, *_LISTS, *_TARS, ".parquet", ".arrow")
_OTHERS = (".csv", ".tsv", ".xlsx", ".xls", ".zip", ".pkl", ".pickle", ".pt", ".npy", ".npz", ".md")
# What WebDataset writes for several shards: {00000..00127}, {a,b}
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]+(?:,[^{},]+)+))\}")
_SPLIT = re.compile(r"(.+)-\d+-of-\d+|(train|test|valid|validation|val|dev|eval)(?=[-_.]|$)")
_SHOWN = 4  # folders that an error names


def files_of(paths: Iterable[Path | str]) -> list[Path]:
    """The files that paths name: files, patterns (``a/*.tar``, ``a/{00..99}.tar``), folders.

    A folder may be one saved by ``datasets``, a prepared Energon dataset, or hold files of records
    (those whose names do not begin with a dot are taken, in the order of their names).

    Raises:
        InputError: nothing is there, or nothing that is read.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        several = _without_braces(str(given))
        if not path.exists() and several != [str(given)]:
            files += files_of(several)
        elif not path.exists() and glob.has_magic(str(given)):
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
    """The records of a file, told by the end of its name; other names are read as JSON.

    Raises:
        InputError: it cannot be read.
    """
    name = path.name.lower()
    if path.is_dir():
        return EnergonRecords(path)
    if name.endswith(".parquet"):
        return ParquetRows(path)
    if name.endswith(".arrow"):
        return ArrowRows(path)
    if name.endswith(_TARS):
        return TarRecords(path, index_folder)
    if name.endswith(_OTHERS):
        raise InputError(
            f"{path}: files of this kind are not read; expected {', '.join(_KNOWN)}: write its "
            "rows as JSON Lines, for example with datasets or pandas"
        )
    return open_json(path, index_folder)


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
        within = _folders_with_records(folder)
        raise InputError(
            f"{folder} holds no file of records; expected {', '.join(_KNOWN)}, a folder saved by "
            "datasets, or a prepared Energon dataset"
            + (f"; its folders do: give one, such as {', '.join(within)}" if within else "")
        )
    _refuse_splits(folder, found)
    return found


def _folders_with_records(folder: Path) -> list[str]:
    """Some folders within this one that hold files of records."""
    within = (
        here
        for here, _, names in os.walk(folder)
        if any(one.lower().endswith(_KNOWN) for one in names)
    )
    return sorted(islice(within, _SHOWN))


def _refuse_splits(folder: Path, files: Iterable[Path]) -> None:
    """Refuse to mix what is to be trained on with what was held out, as names say."""
    named = [_SPLIT.match(one.name) for one in files]
    splits = sorted({one[1] or one[2] for one in named if one is not None})
    if len(splits) > 1:
        raise InputError(
            f"{folder} holds the splits {', '.join(splits)}; name the files of one: "
            f"'{folder / splits[-1]}*'"
        )


def _without_braces(pattern: str) -> list[str]:
    """All names that a pattern with {00..99} or {a,b} stands for."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    choices = words.split(",") if words else _numbers(first, last)
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [whole for one in choices for whole in _without_braces(f"{head}{one}{tail}")]


def _numbers(first: str, last: str) -> list[str]:
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
