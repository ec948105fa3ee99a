"""Prepared Energon datasets, read through the package ``megatron-energon``.

A record is a sample's members, as an Energon dataset of crude samples gives them, or the fields
that ``field_map`` in ``dataset.yaml`` makes of them. Energon says which shards belong to the split
and which samples are left out; ``data/formats`` tells what a record means.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.formats import FieldMap, RawRecord, field_map, tar_record

__all__ = ["ENERGON_FOLDER", "EnergonRecords"]

ENERGON_FOLDER = ".nv-meta"
_SPLIT = "train"
_WEBDATASET = "megatron.energon.flavors.webdataset"


class EnergonRecords:
    """The samples of the training split of a prepared dataset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: Any = None
        self._process = 0
        self._fields = _fields_of(path / ENERGON_FOLDER / "dataset.yaml")
        meta = self._meta()
        self.shard_sizes: Sequence[int] = [shard.count for shard in meta.shards]
        self._kept: list[int] | None = None
        if meta.sample_excludes:
            self._leave_out()

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __getitem__(self, number: int) -> RawRecord:
        if self._reader is None or self._process != os.getpid():  # a fork has its own handles
            self._process, self._reader = os.getpid(), self._open()
        try:
            found = self._reader[number if self._kept is None else self._kept[number]]
        except Exception as error:  # of a tar that is damaged
            raise InputError(
                f"{self.path}, sample {number + 1}: {type(error).__name__}: {error}; prepare the "
                "dataset again"
            ) from error
        key = str(found["__key__"])
        members = {name: one for name, one in found.items() if not name.startswith("__")}
        if self._fields is not None:
            return self._fields.record(key, members, self.path)
        return tar_record(key, members, self.path)

    def _leave_out(self) -> None:
        """Pass over single samples that ``split.yaml`` excludes; every sample is looked at once."""
        reader, first = self._open(), 0
        kept: list[list[int]] = []
        for size in self.shard_sizes:
            kept.append([at for at in range(first, first + size) if reader[at] is not None])
            first += size
        self.shard_sizes = [len(numbers) for numbers in kept]
        self._kept = [number for numbers in kept for number in numbers]

    def _meta(self) -> Any:
        energon = self._packages()
        try:
            return energon["meta"].from_config(energon["path"](str(self.path)), split_part=_SPLIT)
        except Exception as error:
            raise InputError(
                f"{self.path} is no prepared Energon dataset with a split {_SPLIT!r}: "
                f"{type(error).__name__}: {error}; run energon prepare"
            ) from error

    def _open(self) -> Any:
        energon, meta = self._packages(), self._meta()
        return energon["reader"](
            energon["path"](str(self.path)),
            meta.shards,
            sample_filter=lambda key: key not in meta.sample_excludes,
        )

    def _packages(self) -> dict[str, Any]:
        try:
            path = import_module("megatron.energon.epathlib").EPath
            reader = import_module(f"{_WEBDATASET}.itar_reader").ShardInfosITarReader
            meta = import_module(f"{_WEBDATASET}.metadata").WebdatasetMeta
        except ImportError as error:
            raise InputError(
                f"{self.path} is an Energon dataset, which needs a package: "
                f"pip install megatron-energon ({error})"
            ) from error
        return {"path": path, "reader": reader, "meta": meta}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_process": 0}


def _fields_of(path: Path) -> FieldMap | None:
    """The map of fields of a dataset; None where members are read as they are.

    Raises:
        InputError: it has a loader of its own, or no map of fields that can be read.
    """
    import yaml

    try:
        described = yaml.safe_load(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read: {text}; run energon prepare") from error
    if not isinstance(described, dict):
        return None
    for key in ("sample_loader", "part_filter"):
        if described.get(key) is not None:
            raise InputError(
                f"{path}: {key} is {str(described[key])[:100]!r}, code that is not run here; "
                "describe the samples by field_map, or leave both out to have their members told "
                "apart"
            )
    given = described.get("field_map")
    return None if given is None else field_map(given, str(path))
