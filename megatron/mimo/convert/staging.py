"""Output directories that appear when they are whole, and not before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.process.failure import is_disk_full

__all__ = ["check_target", "whole_directory"]


def check_target(target: Path, *, source: Path | None = None) -> None:
    """Refuse an output directory that holds anything.

    Args:
        target: the directory.
        source: a directory whose files are copied, which must not hold the target.

    Raises:
        ConfigError: it exists and is not empty, is a file, or lies in ``source``.
    """
    if source is not None and source.resolve() in target.resolve().parents:
        raise ConfigError(
            f"{target} lies in {source}, whose files are copied; name a directory beside it"
        )
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; expected the name of a new directory")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not empty; name a new directory, or remove it")


@contextmanager
def whole_directory(target: Path, *, size: int) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when the block ends without an error.

    Until then it stands beside it as ``<target>.unfinished-...``; after an error it is removed.

    Args:
        target: must not exist, or be empty.
        size: bytes that will be written.

    Raises:
        ConfigError: there is not enough room, before anything is written or later.
    """
    check_target(target)
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_room(target.parent, size)
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.unfinished-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.replace(target)
    except OSError as error:
        if is_disk_full(error):
            raise ConfigError(
                f"the disk is full: {target} needs {size / 1e9:.2f} GB; make room, or name a "
                "directory on another disk. Nothing is left of what was written"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_room(parent: Path, size: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ConfigError(
            f"{parent} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; make room, or "
            "name a directory on another disk"
        )


def _umask() -> int:
    """The process's umask: folders of mkdtemp are private, and get their usual rights by it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
