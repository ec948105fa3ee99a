"""One job at a time writes to a folder: who owns it stands in a file there.

The file names host and process. It survives whoever wrote it, and is taken over when that one is
dead: on the same machine its process is gone, on another one it no longer touches the file.
Creating it is a hard link to a file that is whole already, which file systems that several hosts
share do in one step too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.process.identity import Process, host_name, machine
from megatron.mimo.process.ranks import starting_job

__all__ = ["Ownership", "claim_folders", "own"]

FILE = ".owner"
BEAT = 5.0  # seconds between two touches of the file
_STALE = 60.0  # seconds without a touch after which an owner on another machine is dead
_TAKING = 10.0  # seconds after which one that was about to take over is dead
_LOOK = 0.5
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """What the file says."""

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    command: str

    def is_dead_here(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        return not Process(pid=self.pid, started=self.started).lives()


class Ownership:
    """A folder that this process owns."""

    def __init__(self, file: Path, owner: _Owner) -> None:
        self._file = file
        self._owner = owner
        self._beaten = time.monotonic()
        self._lock = threading.Lock()  # who beats is another thread than who releases
        self._released = False

    def holds(self) -> bool:
        """Whether the file names nobody else; one that cannot be read now says nothing."""
        try:
            owner = _read(self._file)
        except OSError:
            return True
        return owner is None or owner.token == self._owner.token

    def beat(self, lost: Callable[[], None]) -> None:
        """Touch the file, if it is time to; calls ``lost`` if it names another by now.

        A file that somebody has removed is written again.
        """
        if time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        with self._lock:
            if self._released:
                return
            if self.holds():
                with contextlib.suppress(OSError):
                    if not self._file.exists():
                        self._write_again()
                    os.utime(self._file)
                return
        lost()

    def release(self) -> None:
        """Leave the folder to whoever comes next; from here on nobody can have taken it away."""
        with self._lock:
            self._released = True
            if self.holds():
                with contextlib.suppress(OSError):
                    self._file.unlink()

    def _write_again(self) -> None:
        fresh = self._file.with_name(f"{FILE}.{self._owner.token}")
        fresh.write_text(json.dumps(asdict(self._owner)))
        try:
            _create(fresh, self._file)
        finally:
            fresh.unlink()


def own(folder: Path, *, tell: Callable[[str], None], stale: float = _STALE) -> Ownership | None:
    """Become the owner of a folder, which is made if it is not there.

    Args:
        folder: of a run.
        tell: is given a sentence where it takes a while to see whether an owner lives.
        stale: seconds without a sign of life after which an owner on another machine is dead.

    Returns:
        None for a folder in which this process may not write.

    Raises:
        ConfigError: another job owns the folder.
    """
    me = _describe_self()
    fresh = folder / f"{FILE}.{me.token}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(asdict(me)))
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is not a folder; expected one, or a name that is free; give another --output"
        ) from None
    except OSError as error:
        if error.errno in _READ_ONLY:
            return None
        raise ConfigError(
            f"{folder} cannot be written to: {error.strerror}; make room, or give another --output"
        ) from error
    try:
        if (folder / FILE).exists() and not (folder / FILE).is_file():
            raise ConfigError(f"{folder / FILE} is no regular file; remove it")
        while not _create(fresh, folder / FILE):
            owner = _read(folder / FILE)
            if owner is None:
                time.sleep(0.05)  # it has just gone, or is being written
                _discard_unreadable(folder / FILE, fresh, stale)
                continue
            if not _is_dead(owner, folder, fresh, tell=tell, stale=stale):
                if _read(folder / FILE) != owner:
                    continue  # it has just left
                raise ConfigError(
                    f"{folder} belongs to a run that is going on: process {owner.pid} on "
                    f"{owner.host} since {owner.since} ({owner.command}); wait for its end, stop "
                    "it, or give another --output"
                )
            if _take_over(fresh, folder / FILE, owner):
                break
        return Ownership(folder / FILE, me)
    finally:
        fresh.unlink(missing_ok=True)


def claim_folders(args: Namespace, *, tell: Callable[[str], None]) -> list[Ownership]:
    """Rank 0 becomes the owner of the run's folders; collective over all ranks of a job.

    Args:
        args: parsed arguments: ``output``, ``save``, ``rank`` and ``world_size``.
        tell: as ``own`` takes it.

    Raises:
        ConfigError: on every rank, where another job owns one of them.
    """
    folders = [Path(path) for path in (args.output, args.save) if path is not None]
    if len(folders) == 2 and folders[0].resolve() in folders[1].resolve().parents:
        folders.pop()
    owned: list[Ownership] = []
    refused = ""
    if args.rank == 0:
        try:
            for folder in dict.fromkeys(folders):
                mine = own(folder, tell=tell)
                owned += [] if mine is None else [mine]
        except ConfigError as error:
            refused = str(error)
            for mine in owned:
                mine.release()
    if args.world_size > 1 and folders:
        refused = starting_job().gather(refused)[0]
    if refused:
        raise ConfigError(refused)
    return owned


def _describe_self() -> _Owner:
    process = Process.of(os.getpid())
    return _Owner(
        token=secrets.token_hex(8),
        host=host_name(),
        machine=machine(),
        pid=process.pid,
        started=process.started,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=" ".join(os.path.basename(word) for word in sys.argv[:3]),
    )


def _create(fresh: Path, file: Path) -> bool:
    """Make ``file`` the file ``fresh``, unless there is one."""
    try:
        os.link(fresh, file)
    except FileExistsError:
        return fresh.stat().st_nlink > 1  # NFS may answer twice
    except OSError:  # a file system without links
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as target:
            target.write(fresh.read_bytes())
    return True


def _read(file: Path) -> _Owner | None:
    """The owner that a file names; None without a file, or for one that is not written yet."""
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _is_dead(
    owner: _Owner, folder: Path, fresh: Path, *, tell: Callable[[str], None], stale: float
) -> bool:
    if owner.machine == machine():
        return owner.is_dead_here()
    file = folder / FILE
    first, told = _touched(file), False
    while True:
        os.utime(fresh)  # by the clock of the file system, as the owner does
        touched = _touched(file)
        if touched is None or touched != first:
            return False  # the caller looks again, or it lives
        age = _touched(fresh) or 0.0
        if age - touched > stale:
            return True
        if not told:
            told = True
            tell(
                f"{folder} belongs to process {owner.pid} on {owner.host}, last heard of "
                f"{age - touched:.0f} s ago; waiting up to {stale:.0f} s to see whether it lives"
            )
        time.sleep(_LOOK)


def _touched(file: Path) -> float | None:
    """When a file was touched last; it is opened, which makes NFS ask the server."""
    try:
        with file.open("rb") as handle:
            return os.fstat(handle.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _take_over(fresh: Path, file: Path, dead: _Owner) -> bool:
    """Put ``fresh`` in the place of a dead owner's file; one process at a time can try."""
    taking = file.with_name(f"{FILE}.taking")
    if not _create(fresh, taking):
        begun, now = _touched(taking), _touched(fresh)
        if begun is not None and now is not None and now - begun > _TAKING:
            taking.unlink(missing_ok=True)
        time.sleep(0.05)
        os.utime(fresh)
        return False
    owner = _read(file)
    if owner is not None and owner.token != dead.token:
        taking.unlink(missing_ok=True)
        return False
    os.replace(taking, file)
    mine = _read(fresh)
    now_owner = _read(file)
    return mine is not None and now_owner is not None and now_owner.token == mine.token


def _discard_unreadable(file: Path, fresh: Path, stale: float) -> None:
    """Remove a file that names nobody and that nobody has written to for long."""
    with contextlib.suppress(OSError):
        os.utime(fresh)
        touched, now = _touched(file), _touched(fresh)
        unreadable = touched is not None and _read(file) is None
        if unreadable and now is not None and touched is not None and now - touched > stale:
            file.unlink()
