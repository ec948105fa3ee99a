"""The file beside the iterations that says which one is the newest that is whole."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError

__all__ = [
    "RELEASE",
    "TRACKER",
    "Tracker",
    "holds_checkpoint",
    "is_iteration",
    "iteration_name",
    "iterations",
]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # in place of an iteration: weights that were imported, without a run's state
_NAME = re.compile(r"iter_([0-9]{7,12})")
_MOST = 100  # bytes that are read of it


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """What stands in the place of the tracker file.

    Attributes:
        name: "release" or a number without leading zeros; None where it says neither.
        trouble: what is wrong with it, as the rest of a sentence; None where nothing is, or where
            there is no such file.
    """

    name: str | None = None
    trouble: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Tracker:
        """Read the file in ``folder``; what is no file is never opened."""
        path = folder / TRACKER
        try:
            if not path.is_file():
                there = os.path.lexists(path)
                return cls(trouble="it is not a file" if there else None)
            with path.open("rb") as file:
                text = file.read(_MOST + 1).decode(errors="replace").strip()
        except OSError as error:
            return cls(trouble=f"it cannot be read: {error.strerror}")
        if text == RELEASE:
            return cls(name=RELEASE)
        if re.fullmatch(r"[0-9]{1,12}", text):
            return cls(name=str(int(text)))
        return cls(trouble=f"it says {text[:20]!r}, expected an iteration")

    @property
    def iteration(self) -> int | None:
        """The number, if that is what it says."""
        return int(self.name) if self.name not in (None, RELEASE) else None

    @staticmethod
    def put_right(folder: Path, name: str) -> None:
        """Let the file say ``name``, whatever stands in its place.

        Raises:
            ConfigError: it cannot be written.
        """
        path = folder / TRACKER
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.move(path, folder / f"{TRACKER}.damaged")
            fresh = folder / f"{TRACKER}.new"
            fresh.unlink(missing_ok=True)
            with fresh.open("x") as file:
                file.write(name)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError as error:
            raise ConfigError(
                f"{path} has to say {name!r} and cannot be written: {error.strerror}; write it, "
                "or copy the checkpoint to a place where it can be written"
            ) from error


def iterations(folder: Path) -> list[int]:
    """The iterations that ``folder`` has folders of, oldest first, complete or not."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.name == iteration_name(int(match[1])) and path.is_dir():
            found.append(int(match[1]))
    return sorted(found)


def is_iteration(folder: Path) -> bool:
    """Whether ``folder`` is what a root holds, not a root: one iteration, or a release."""
    named = folder.name == RELEASE or _NAME.fullmatch(folder.name) is not None
    return (named and folder.is_dir()) or (folder / ".metadata").is_file()


def iteration_name(number: int) -> str:
    """What the folder of an iteration is called."""
    return f"iter_{number:07d}"


def holds_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a root in which a checkpoint was finished, whatever state it is in."""
    finished = (folder / iteration_name(number) / "metadata.json" for number in iterations(folder))
    return (
        os.path.lexists(folder / TRACKER)
        or (folder / RELEASE).is_dir()
        or any(map(os.path.lexists, finished))
    )
