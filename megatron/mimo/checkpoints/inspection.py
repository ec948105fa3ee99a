"""Whether a checkpoint is whole, and still holds what was written.

Megatron writes ``iter_0000100/``: first the ``*.distcp`` files, then ``.metadata`` that indexes
them, then ``metadata.json``; then come our hashes, and at last the tracker file with the number
100. A run that is killed leaves any prefix of this. Disks and copies do the rest.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.mimo.backend.pickles import load_index, load_object
from megatron.mimo.checkpoints.hashes import (
    MANIFEST,
    FileHash,
    ManifestError,
    first_change,
    read_manifest,
    share,
)
from megatron.mimo.process.ranks import Ranks

__all__ = ["FORMAT", "Inspector", "problem"]

FORMAT = "metadata.json"  # what is written last, but for the hashes
_INDEX = ".metadata"
_ZIP_START, _ZIP_END, _ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22  # of what torch.save writes


class Inspector:
    """Looks at checkpoints before they are loaded, each once.

    Collective over ``ranks``: all look at the same folders in the same order, each reads a share
    of the files, and all get the same answer.

    Args:
        ranks: this process alone by default.
        hashes: compare the bytes with the hashes that were written with them.

    Attributes:
        hashes: as given.
        unchecked: folders of whole checkpoints whose bytes were not compared, for want of hashes.
        said: what the user should know, for those who look for a checkpoint to add to.
    """

    def __init__(self, ranks: Ranks | None = None, *, hashes: bool = True) -> None:
        self.ranks = ranks or Ranks()
        self.unchecked: set[Path] = set()
        self.said: list[str] = []
        self.hashes = hashes
        self._verdicts: dict[Path, str | None] = {}

    def problem(self, folder: Path) -> str | None:
        """What keeps a checkpoint's folder from being loaded; None where it is as it was written.

        Args:
            folder: one iteration's.
        """
        if folder not in self._verdicts:
            try:
                seen = self._look(folder)
            except OSError as error:  # a dead disk, or not ours to read
                seen = f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
            answers = self.ranks.gather(seen)
            self._verdicts[folder] = next(filter(None, answers), None)
            if self.hashes and not os.path.lexists(folder / MANIFEST):
                self.unchecked.add(folder)
        return self._verdicts[folder]

    def _look(self, folder: Path) -> str | None:
        trouble = problem(folder)
        if trouble is not None or not self.hashes:
            return trouble
        manifest = read_manifest(folder)
        rank, size = self.ranks.rank, self.ranks.size
        if manifest is None:
            return _first_hole(folder, rank, size)
        return first_change(folder, manifest, share(sorted(manifest), rank=rank, size=size))


def problem(folder: Path) -> str | None:
    """What keeps a checkpoint's folder from being loaded; None when it is complete.

    Checks that all parts are files, with the sizes that index and hashes give; the bytes in them
    are an :class:`Inspector`'s.
    """
    if not folder.is_dir():
        return "it is not a folder" if os.path.lexists(folder) else "it does not exist"
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return str(error)
    if any(folder.glob("mp_rank_0*")):  # written with --ckpt-format torch: no index
        return first_change(folder, manifest) if manifest else _first_file_that_is_no_zip(folder)
    return (
        _problem_of_format(folder)
        or _problem_of_index(folder, manifest)
        or (first_change(folder, manifest) if manifest else None)
    )


def _problem_of_format(folder: Path) -> str | None:
    """What is wrong with the two files that are written last."""
    for name, what in ((_INDEX, "its index (.metadata)"), (FORMAT, FORMAT)):
        if not (folder / name).is_file():
            if os.path.lexists(folder / name):
                return f"{what} is not a file"
            return f"{what} is missing: writing it was interrupted"
    try:
        content = json.loads((folder / FORMAT).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{FORMAT} cannot be read: {type(error).__name__}: {str(error)[:100]}"
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend != "torch_dist":
        return f"{FORMAT} says the format {backend!r}, expected 'torch_dist'"
    return None


def _problem_of_index(folder: Path, manifest: Mapping[str, FileHash] | None) -> str | None:
    """What is wrong with the index, or with the files that it names."""
    try:
        needed: dict[str, int] = {}
        for place in _places(folder):
            end = place.offset + place.length
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        return f"its index (.metadata) cannot be read: {type(error).__name__}: {_short(error)}"
    if (folder / "common.pt").is_file():  # of older versions of megatron-core
        try:
            with (folder / "common.pt").open("rb") as file:
                load_object(file)
        except Exception as error:  # noqa: BLE001 - as above
            reason = _short(error).partition(". ")[0]
            return f"common.pt cannot be read: {type(error).__name__}: {reason}"
    for name, size in sorted(needed.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is not a file" if os.path.lexists(path) else f"{name} is missing"
        actual = path.stat().st_size
        if actual < size:
            return f"{name} has {actual} bytes, expected {size}: it is cut off"
    unnamed = sorted({_INDEX, FORMAT, *needed} - manifest.keys()) if manifest is not None else []
    return f"{MANIFEST} does not name {unnamed[0]}" if unnamed else None


def _places(folder: Path) -> list[Any]:
    with (folder / _INDEX).open("rb") as file:
        return list((load_index(file).storage_data or {}).values())


def _first_hole(folder: Path, rank: int, size: int) -> str | None:
    """A piece of a tensor that is not what ``torch.save`` writes, in a checkpoint without hashes.

    Only the ends of each piece are read.
    """
    if not (folder / _INDEX).is_file():
        return None
    pieces: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place in _places(folder):
        if place.length >= _ZIP_END_SIZE:
            pieces[place.relative_path].append((place.offset, place.length))
    for name in share(sorted(pieces), rank=rank, size=size):
        with (folder / name).open("rb") as file:
            for offset, length in sorted(pieces[name]):
                file.seek(offset)
                start = file.read(len(_ZIP_START))
                file.seek(offset + length - _ZIP_END_SIZE)
                end = file.read(len(_ZIP_END))
                if not any(start) or (start == _ZIP_START) != (end == _ZIP_END):
                    return f"{name} holds no tensor at byte {offset}: it is damaged"
    return None


def _first_file_that_is_no_zip(folder: Path) -> str | None:
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        name = path.relative_to(folder)
        if not path.is_file():
            return f"{name} is not a file"
        if not zipfile.is_zipfile(path):
            return f"{name} is not what torch.save writes: it is cut off or damaged"
    return None


def _short(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
