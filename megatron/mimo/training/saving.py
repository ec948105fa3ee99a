"""Adds an atomic end and a helpful error to Megatron's synchronous writing of checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.backend.hooks import TRACKER_NAME
from megatron.mimo.backend.patching import replaced
from megatron.mimo.checkpoints.tracker import TRACKER, iteration_name
from megatron.mimo.process.failure import is_disk_full

__all__ = ["SaveError", "atomic_tracker", "clear_place", "save_error"]


_FULL = 32 * 2**20  # bytes; less than this free is full


class SaveError(MimoError, RuntimeError):
    """A checkpoint could not be written."""


def save_error(
    folder: Path, iteration: int, earlier: int | None, error: BaseException
) -> SaveError:
    """The error for a checkpoint that was not written; removes its parts.

    Args:
        folder: the ``--save`` directory.
        iteration: the checkpoint that failed.
        earlier: the iteration of the last one that was written or loaded.
        error: what writing raised.
    """
    # the writers pass on an error's text, and torch's own says "file write failed" for any reason
    free = shutil.disk_usage(folder).free
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = f"writing a file failed ({free / 2**20:.0f} MiB are free; {lines[-1].strip()})"
    if is_disk_full(error) or free < _FULL:
        reason = f"the disk is full ({free / 2**20:.0f} MiB are free); make room"
    shutil.rmtree(folder / f"iter_{iteration:07d}", ignore_errors=True)  # it only takes room
    kept = "there is no earlier one"
    if earlier is not None:
        kept = f"that of iteration {earlier} is intact, and the same command continues from it"
    return SaveError(
        f"the checkpoint of iteration {iteration} could not be written to {folder}: {reason}; "
        f"{kept}"
    )


def clear_place(folder: Path, iteration: int) -> None:
    """Remove an older checkpoint, damaged or given up, from where a new one is to be written.

    Collective. Its files would mix with the new ones, and anything else in the place of a file (a
    folder, a named pipe) would stop the writers.
    """
    place = folder / iteration_name(iteration)
    if dist.get_rank() == 0 and not place.is_symlink():
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    dist.barrier()


@contextmanager
def atomic_tracker(folder: Path) -> Iterator[None]:
    """Let Megatron write the tracker file beside its place, and move it there when it is whole."""
    final, fresh = folder / TRACKER, folder / f"{TRACKER}.new"
    writer = dist.get_rank() == 0
    if writer and final.is_file():
        shutil.copy(final, fresh)

    def beside(original: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda path: str(fresh) if Path(path) == folder else original(path)

    try:
        with replaced({TRACKER_NAME: beside}):
            yield
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    if writer:
        _sync(fresh)
        fresh.replace(final)
        _sync(folder)
    dist.barrier()  # no rank goes on while the checkpoint is not the official one


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
