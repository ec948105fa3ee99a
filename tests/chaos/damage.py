"""What disks, copies and people do to a checkpoint: damages of every kind to every kind of file.

``DAMAGES`` are done to one iteration's folder, ``TRACKERS`` to the root that holds it. Each is a
name and a function of the folder and a ``random.Random``, which returns the name of what was hit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from megatron.mimo.checkpoints.tracker import TRACKER

__all__ = ["DAMAGES", "TRACKERS", "Damage"]

Damage = Callable[[Path, Random], str]


def flip(path: Path, rng: Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: Random) -> None:
    """Lose some of the end, or all."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def zero(path: Path, rng: Random) -> None:
    """Lose blocks of a file that keeps its size; all of a small one."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(content) // 2)) // 4096 * 4096
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)


def delete(path: Path, _: Random) -> None:
    """Remove it."""
    path.unlink()


def become_folder(path: Path, _: Random) -> None:
    """A folder stands in its place."""
    path.unlink()
    path.mkdir()


def become_pipe(path: Path, _: Random) -> None:
    """A named pipe stands in its place: who opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def become_loop(path: Path, _: Random) -> None:
    """A symbolic link to itself stands in its place."""
    path.unlink()
    path.symlink_to(path.name)


_KINDS: dict[str, Callable[[Path, Random], None]] = {
    "bit flipped": flip,
    "cut off": truncate,
    "zeroed": zero,
    "deleted": delete,
    "a folder": become_folder,
    "a pipe": become_pipe,
    "a link loop": become_loop,
}
_FILES = {
    "weights": "*.distcp",
    "index": ".metadata",
    "format": "metadata.json",
    "hashes": "hashes.json",
}


def _damage(pattern: str, kind: Callable[[Path, Random], None], folder: Path, rng: Random) -> str:
    path = rng.choice(sorted(folder.glob(pattern)))
    kind(path, rng)
    return path.name


DAMAGES: tuple[tuple[str, Damage], ...] = (
    *(
        (f"{file}, {name}", partial(_damage, pattern, kind))
        for file, pattern in _FILES.items()
        for name, kind in _KINDS.items()
        if (file, name) != ("hashes", "deleted")  # a checkpoint without is one of older versions
    ),
)


def _track(content: bytes, root: Path, _: Random) -> str:
    (root / TRACKER).write_bytes(content)
    return TRACKER


def _replace_tracker(kind: Callable[[Path, Random], None], root: Path, rng: Random) -> str:
    kind(root / TRACKER, rng)
    return TRACKER


def _remove_iteration(root: Path, rng: Random) -> str:
    """The tracker file names an iteration that is not there."""
    folder = max(root.glob("iter_*"))
    shutil.rmtree(folder)
    return folder.name


TRACKERS: tuple[tuple[str, Damage], ...] = (
    ("empty", partial(_track, b"")),
    ("zeroed", partial(_track, bytes(8))),
    ("a superscript", partial(_track, "²".encode())),
    ("a negative number", partial(_track, b"-3")),
    ("a long number", partial(_track, b"9" * 5000)),
    ("not text", partial(_track, b"\xff\xfe\x00")),
    ("release without one", partial(_track, b"release")),
    ("an iteration that is not there", _remove_iteration),
    *((name, partial(_replace_tracker, _KINDS[name])) for name in list(_KINDS)[3:]),
)
