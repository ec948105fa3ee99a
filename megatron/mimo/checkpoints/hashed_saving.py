"""Hashes of a checkpoint that the ranks of a job are writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron.mimo.backend.hooks import ASYNC_SAVE
from megatron.mimo.backend.patching import replaced
from megatron.mimo.checkpoints.hashes import (
    MANIFEST,
    FileHash,
    hash_files,
    list_files,
    share,
    write_manifest,
    written_by,
)
from megatron.mimo.process.ranks import Ranks, running_job

__all__ = ["hash_checkpoint", "hashed_by_writers"]


def hash_checkpoint(
    folder: Path, ranks: Ranks | None = None, *, known: Mapping[str, FileHash] | None = None
) -> None:
    """Write the manifest of a checkpoint whose files are all on the disk.

    Collective over ``ranks``: each reads the files that it has written, whose bytes its host still
    has in memory, and rank 0 writes the manifest.

    Args:
        folder: of the checkpoint.
        ranks: this process alone by default.
        known: hashes of files that this rank has taken as it wrote them.
    """
    ranks, known = ranks or Ranks(), known or {}
    names = list_files(folder)
    mine = [name for name in names if written_by(name) == ranks.rank]
    others = [name for name in names if (written_by(name) or 0) >= ranks.size]
    others += [name for name in names if written_by(name) is None]
    others = ranks.gather(sorted(others))[0]  # rank 0 has written most of them
    mine += share(others, rank=ranks.rank, size=ranks.size)
    found = hash_files(folder, sorted({*mine} - known.keys()))
    _put_together(folder, found | dict(known), ranks)


@contextmanager
def hashed_by_writers() -> Iterator[None]:
    """Within this context an asynchronous save of Megatron's hashes what it writes.

    The process that writes a rank's files reads them again when they are written, so that training
    goes on meanwhile. What they found is put together when the save is finished on all ranks,
    before the tracker file names it.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def save(state: Any, folder: Any, *args: Any, **keywords: Any) -> Any:
            request = original(state, folder, *args, **keywords)
            if request is None:
                return None
            ranks = running_job()
            if request.async_fn is not None:
                write = partial(_write_and_hash, request.async_fn, Path(folder), ranks.rank)
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(_finish, Path(folder), ranks))
            return request

        return save

    with replaced({ASYNC_SAVE: around}):
        yield


def _write_and_hash(
    write: Callable[..., Any], folder: Path, rank: int, *args: Any, **keywords: Any
) -> None:
    """What a rank's writer does; the results lie in a file of the rank's until the end."""
    write(*args, **keywords)
    names = [name for name in list_files(folder) if written_by(name) == rank]
    found = hash_files(folder, names)
    part = _part(folder, rank)
    fresh = part.with_name(f"{part.name}.new")
    fresh.write_text(json.dumps({name: [one.size, one.hash] for name, one in found.items()}))
    fresh.replace(part)


def _finish(folder: Path, ranks: Ranks) -> None:
    """Collective, when all files are written."""
    part = _part(folder, ranks.rank)
    mine = {}
    if part.is_file():
        content = json.loads(part.read_text())
        mine = {name: FileHash(size=size, hash=text) for name, (size, text) in content.items()}
        part.unlink()
    elif ranks.rank:
        names = [name for name in list_files(folder) if written_by(name) == ranks.rank]
        mine = hash_files(folder, names)
    if ranks.rank == 0:
        rest = [n for n in list_files(folder) if written_by(n) in (None, 0) and n not in mine]
        mine |= hash_files(folder, rest)
    _put_together(folder, mine, ranks)


def _put_together(folder: Path, mine: dict[str, FileHash], ranks: Ranks) -> None:
    parts = ranks.gather([(name, one.size, one.hash) for name, one in mine.items()])
    if ranks.rank == 0:
        write_manifest(
            folder,
            {name: FileHash(size=size, hash=text) for part in parts for name, size, text in part},
        )


def _part(folder: Path, rank: int) -> Path:
    return folder / f".{MANIFEST}.{rank}"
