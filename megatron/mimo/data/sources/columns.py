"""Rows of tables: parquet, Arrow files, and folders saved by the package ``datasets``.

A column that is null in a row is left out, also within structures: Arrow gives every row the keys
of all others.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats import RawRecord

__all__ = ["ArrowRows", "ParquetRows", "saved_dataset_files"]

_KEPT_GROUPS = 4  # row groups of a parquet file that stay decoded in a process


class ParquetRows:
    """The rows of a parquet file. A row group is decoded as a whole: read them in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = self._open().metadata
        self.shard_sizes: Sequence[int] = [
            metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)
        ]
        self._ends = np.cumsum(self.shard_sizes, dtype=np.int64)
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._file: Any = None
        self._process = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> RawRecord:
        group = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[group]) - self.shard_sizes[group]
        place = f"row {number + 1}"
        try:
            row = self._group(group).slice(number - first, 1).to_pylist()[0]
        except Exception as error:  # Arrow's own, of many kinds
            raise _unreadable(f"{self.path}, {place}", error) from error
        return RawRecord(value=without_nulls(row), file=self.path, place=place)

    def _group(self, number: int) -> Any:
        if self._process != os.getpid():  # a fork has its own
            self._process, self._file = os.getpid(), self._open()
            self._groups.clear()
        if number not in self._groups:
            if len(self._groups) >= _KEPT_GROUPS:
                self._groups.popitem(last=False)
            self._groups[number] = self._file.read_row_group(number, use_threads=False)
        self._groups.move_to_end(number)
        return self._groups[number]

    def _open(self) -> Any:
        parquet = _arrow(self.path, "parquet")
        try:
            return parquet.ParquetFile(self.path, memory_map=True)
        except Exception as error:
            raise _unreadable(str(self.path), error) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict(), "_file": None, "_process": 0}


class ArrowRows:
    """The rows of an Arrow file, of the stream or the file kind; memory-mapped."""

    def __init__(self, path: Path, *, media_folder: Path | None = None) -> None:
        self.path = path
        self._folder = media_folder
        self._table: Any = None
        self._count = len(self._opened())

    @property
    def shard_sizes(self) -> Sequence[int]:
        """One: any row is read as fast as any other."""
        return [self._count]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> RawRecord:
        place = f"row {number + 1}"
        try:
            row = self._opened().slice(number, 1).to_pylist()[0]
        except Exception as error:  # Arrow's own, of many kinds
            raise _unreadable(f"{self.path}, {place}", error) from error
        return RawRecord(
            value=without_nulls(row), file=self.path, place=place, media_folder=self._folder
        )

    def _opened(self) -> Any:
        if self._table is None:
            ipc = _arrow(self.path, "ipc")
            try:
                self._table = _arrow_table(ipc, self.path)
            except Exception as error:
                raise _unreadable(str(self.path), error) from error
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}


def saved_dataset_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote; None for another folder.

    Raises:
        InputError: it holds several splits, or its list of files is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.parent.name for one in folder.glob("*/state.json"))
        raise InputError(
            f"{folder} holds the splits {', '.join(splits)}; name the folder of one: "
            f"{folder / (splits[0] if splits else 'train')}"
        )
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        files = json.loads(state.read_text())["_data_files"]
        return [folder / one["filename"] for one in files]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{state} is damaged ({type(error).__name__}: {error}); save the dataset again"
        ) from error


def without_nulls(value: Any) -> Any:
    """A row without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _arrow_table(ipc: Any, path: Path) -> Any:
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = _arrow(path, "lib").memory_map(str(path))
    return (ipc.open_file(source) if is_file else ipc.open_stream(source)).read_all()


def _arrow(path: Path, part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{part}")
    except ImportError as error:
        raise InputError(
            f"{path} is read with a package that is not installed: "
            "pip install 'megatron-mimo[data]'"
        ) from error


def _unreadable(what: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    return InputError(f"{what}: cannot be read: {text}; it is damaged or cut off: copy it again")
