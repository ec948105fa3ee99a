"""A rank among the processes of its host: what it does, who started it, and its last word."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NoReturn

from megatron.mimo.backend.hooks import EXIT
from megatron.mimo.backend.patching import PROCESS
from megatron.mimo.process.board import Board, Slot, Word, folder_of, place
from megatron.mimo.process.identity import Process, host_name
from megatron.mimo.process.parents import Launcher, bind_to_parent, find_launcher
from megatron.mimo.process.stacks import STACKS, Frame
from megatron.mimo.process.witness import Watch

__all__ = ["Presence", "here", "join"]

_LOOK = 0.5  # seconds between two looks at the launcher
_WITNESS_COMES = 3.0  # seconds that a last word waits for a witness that is being started


@dataclass(kw_only=True)
class Presence:
    """This process as one rank of a job.

    Attributes:
        rank: its number.
        slot: what it does, for the witness.
        board: what all ranks of this host say; None where there is none.
        launcher: who has started it; None where nobody needs to be known.
        beats: called twice a second, by a thread of its own.
        witness: the process that this one has started to watch the ranks of this host.
    """

    rank: int = 0
    slot: Slot = field(default_factory=Slot)
    board: Board | None = None
    launcher: Launcher | None = None
    beats: list[Callable[[], None]] = field(default_factory=list)
    witness: subprocess.Popen[bytes] | None = None
    _thread: threading.Thread | None = None
    _stacks: IO[bytes] | None = None

    def where(self) -> str:
        """Rank, host, part of the model, iteration and phase, for a message."""
        at = place(self.slot.part, self.slot.iteration, self.slot.phase)
        return f"rank {self.rank} on {host_name()}, {at}"

    def watched(self) -> bool:
        """Whether a witness lives that repeats last words when the launcher has had its say."""
        if self.board is None or self.launcher is None or self.launcher.kind == "tasks":
            return False
        end = time.monotonic() + _WITNESS_COMES
        while not self.board.witness_file.exists():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return self.board.witness_lives()

    def say(self, kind: str, text: str, *, printed: bool) -> None:
        """Leave a last word on the board, if there is one."""
        if self.board is not None:
            word = Word(
                kind=kind, text=text, when=time.monotonic(), rank=self.rank, printed=printed
            )
            with contextlib.suppress(OSError):
                self.board.say(word)

    def others_failed(self) -> bool:
        """Whether another rank of this host is known to have failed by itself."""
        if self.board is None:
            return False
        words = self.board.words()
        told = any(word.kind in ("failed", "refused") and word.rank != self.rank for word in words)
        return told or self.board.verdict_file.exists()

    def beat(self, action: Callable[[], None]) -> None:
        """Call ``action`` from now on, twice a second."""
        self.beats.append(action)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while self.beats:
            time.sleep(_LOOK)
            for action in self.beats:
                action()


_current = Presence()


def here() -> Presence:
    """This process's presence; of one that has not joined a job, nobody hears."""
    return _current


def join(*, stall_timeout: float) -> Presence:
    """Take part in the job that this process's environment describes.

    The process ends with its launcher from now on, and a witness watches it: the first rank of a
    host starts one.

    Args:
        stall_timeout: seconds after which the witness ends a rank that stands still; 0: never.
    """
    global _current
    environment = os.environ
    launcher = find_launcher()
    presence = Presence(rank=int(environment.get("RANK", "0")), launcher=launcher)
    _current = presence
    _notice_exits()
    if launcher is not None:
        _end_with(launcher, presence)
    names = [environment.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    try:
        parent = launcher.process if launcher is not None else Process.of(os.getppid())
        board = Board(folder_of(parent, *names))
        board.folder.mkdir(mode=0o700, exist_ok=True)
        presence.slot = board.take_slot(presence.rank)
        presence.board = board
        _keep_stacks(board.traceback_file(presence.rank), presence)
        if int(environment.get("LOCAL_RANK", presence.rank)) == 0 and board.is_first():
            _start_witness(presence, board, stall_timeout)
    except OSError:  # a full disk, say: the run goes on without
        presence.board = None
    return presence


def _end_with(launcher: Launcher, presence: Presence) -> None:
    direct = launcher.is_parent and launcher.kind != "tasks"  # whose threads are known to stay
    if direct and bind_to_parent(launcher.process.pid):
        return

    def look() -> None:
        if not launcher.process.lives():
            os.kill(os.getpid(), signal.SIGKILL)

    presence.beat(look)


def _notice_exits() -> None:
    """Let code that leaves this process with ``os._exit`` be known, by file and line."""
    PROCESS.apply([replace(EXIT, replacement=_noticing)])


def _noticing(leave: Callable[[int], NoReturn]) -> Callable[[int], NoReturn]:
    own = os.getpid()

    def noticed(status: int) -> NoReturn:
        presence = here()
        if os.getpid() == own and not presence.slot.is_done:
            caller = sys._getframe(1)
            frame = Frame(
                file=caller.f_code.co_filename,
                line=caller.f_lineno,
                function=caller.f_code.co_name,
            )
            text = f"error: os._exit({status}) was called [{presence.where()}, at {frame}]"
            presence.say("failed", text, printed=False)
        leave(status)

    return noticed


def _keep_stacks(path: Path, presence: Presence) -> None:
    """Let the interpreter write this process's stacks when it crashes, or is asked with STACKS."""
    presence._stacks = path.open("wb", buffering=0)  # open as long as the process
    faulthandler.enable(file=presence._stacks, all_threads=False)
    faulthandler.register(STACKS, file=presence._stacks, all_threads=True)


def _start_witness(presence: Presence, board: Board, stall_timeout: float) -> None:
    environment, launcher = os.environ, presence.launcher
    size = int(environment.get("WORLD_SIZE", "1"))
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    watch = Watch(
        folder=str(board.folder),
        launcher=None if launcher is None else launcher.process,
        kind="" if launcher is None else launcher.kind,
        here=int(environment.get("LOCAL_WORLD_SIZE", size)),
        size=size,
        stall_timeout=stall_timeout,
        restarts_left=restarts - int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    presence.witness = subprocess.Popen(
        [sys.executable, "-m", "megatron.mimo.process.witness", watch.to_text()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
