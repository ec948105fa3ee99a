"""The witness: one small process on each host that sees how the ranks fare and says why they ended.

A rank that is killed, crashes or is stopped cannot speak, and torchrun has the last word in a
traceback of its own. The witness watches the ranks from outside, warns when one stands still, ends
it when that lasts, and says at the very end, once, who failed first, how and where. The first rank
of each host starts it, and it ends with the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.mimo.process.board import Board, SlotContent, replace_text
from megatron.mimo.process.cause import Ending, cause_of, describe_exit
from megatron.mimo.process.identity import Process, exit_status, host_name, wait_for_end
from megatron.mimo.process.stall import StallWatch

__all__ = ["Watch", "Witness"]

_LOOK = 0.5  # seconds between two looks, where nothing happens
_LAUNCHER_SPEAKS = 15.0  # seconds in which a launcher ends after its ranks
_ALL_COME = 60.0  # seconds in which the ranks of a host join


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a witness is told.

    Attributes:
        folder: the board's.
        launcher: who has started the ranks; None where nobody needs to be waited for.
        kind: of launcher, as in ``Launcher``; empty without one.
        here: ranks on this host.
        size: ranks of the job.
        stall_timeout: seconds until a rank that stands still is ended; 0: never.
        restarts_left: how often the launcher will start the ranks anew.
    """

    folder: str
    launcher: Process | None
    kind: str
    here: int
    size: int
    stall_timeout: float
    restarts_left: int

    def to_text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Watch:
        """The inverse of ``to_text``."""
        content = json.loads(text)
        launcher = content.pop("launcher")
        return cls(launcher=None if launcher is None else Process(**launcher), **content)


class Witness:
    """Watches until every rank of this host has ended."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._board = Board(Path(watch.folder))
        self._began = time.monotonic()
        self._slots: dict[int, SlotContent] = {}
        self._handles: dict[int, int] = {}  # process number -> descriptor that says when it ends
        self._statuses: dict[int, int] = {}  # process number -> how it ended
        self._endings: dict[int, Ending] = {}
        self._launcher_ended: float | None = None
        self._stall = StallWatch(self._board, watch.stall_timeout, others=watch.size > watch.here)
        own = Process.of(os.getpid())
        replace_text(self._board.witness_file, f"{own.pid} {own.started or '-'}")

    def run(self) -> str | None:
        """Watch to the end; the cause of the job's failure, None where there is none to say."""
        while not self._all_ended():
            self._wait()
            self._look_for_ranks()
            self._look_at_ends()
            living = {rank: slot for rank, slot in self._slots.items() if rank not in self._endings}
            for line in self._stall.look(living):
                _say(line)
        cause = cause_of(
            self._board.words(),
            [*self._endings.values(), *self._stall.ended],
            launcher_ended=self._launcher_ended,
            launcher=self._watch.launcher,
        )
        text = "well" if cause is None else cause.text
        with contextlib.suppress(OSError):
            replace_text(self._board.verdict_file, text)
        return None if cause is None or cause.printed else cause.text

    def wait_for_launcher(self) -> None:
        """Let torchrun print its own report first, for a person looks at the last line."""
        watch = self._watch
        if watch.launcher is None or watch.kind != "torchrun" or watch.restarts_left > 0:
            return
        wait_for_end(watch.launcher, _LAUNCHER_SPEAKS)

    def leave(self) -> None:
        """Remove the board; the launcher of this project reads it first, and removes it itself."""
        if self._watch.kind != "ours":
            shutil.rmtree(self._board.folder, ignore_errors=True)

    def _all_ended(self) -> bool:
        if not self._slots or set(self._slots) - set(self._endings):
            return False
        late = time.monotonic() - self._began > _ALL_COME
        return len(self._slots) >= self._watch.here or late or self._launcher_ended is not None

    def _wait(self) -> None:
        """Until a process ends, or a moment."""
        if not self._handles:
            time.sleep(0.05)
            return
        poll = select.poll()
        for handle in self._handles.values():
            poll.register(handle, select.POLLIN)
        soon = len(self._slots) < self._watch.here
        ready = {handle for handle, _ in poll.poll(1000 * (0.05 if soon else _LOOK))}
        for pid, handle in self._handles.items():  # at once, before its launcher waits for it
            if handle in ready and (status := exit_status(pid)) is not None:
                self._statuses[pid] = status

    def _look_for_ranks(self) -> None:
        self._slots = self._board.slots() or self._slots
        processes = [slot.process for slot in self._slots.values()]
        launcher = self._watch.launcher
        for process in [*processes, *([] if launcher is None else [launcher])]:
            known = process.pid in self._handles or any(
                ending.pid == process.pid for ending in self._endings.values()
            )
            if not known and hasattr(os, "pidfd_open"):
                with contextlib.suppress(OSError):
                    self._handles[process.pid] = os.pidfd_open(process.pid)

    def _look_at_ends(self) -> None:
        now = time.monotonic()
        launcher = self._watch.launcher
        if launcher is not None and self._launcher_ended is None and not launcher.lives():
            self._launcher_ended = now
            self._forget(launcher.pid)
        for rank, slot in self._slots.items():
            if rank in self._endings or slot.process.lives():
                continue
            pid = slot.process.pid
            status = self._statuses.get(pid, exit_status(pid))
            slot = self._board.slots().get(rank, slot)  # what it did last
            stacks = self._board.traceback_file(rank)
            text = stacks.read_text(errors="replace") if stacks.exists() else ""
            self._endings[rank] = Ending(
                rank=rank,
                pid=pid,
                when=now,
                done=slot.done,
                status=status,
                text=describe_exit(slot, status, text, host=host_name()),
            )
            self._forget(pid)
            self._tell_peers(rank)

    def _tell_peers(self, rank: int) -> None:
        """Write a verdict as soon as a rank has ended without a word: the others need not speak."""
        told = any(word.rank == rank for word in self._board.words())
        if not told and not self._endings[rank].done and not self._board.verdict_file.exists():
            with contextlib.suppress(OSError):
                replace_text(self._board.verdict_file, self._endings[rank].text)

    def _forget(self, pid: int) -> None:
        handle = self._handles.pop(pid, None)
        if handle is not None:
            os.close(handle)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> None:
    """What ``python -m megatron.mimo.process.witness WATCH`` does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers signal all processes of a job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    witness = Witness(Watch.from_text(sys.argv[1]))
    try:
        text = witness.run()
        if text is not None:
            witness.wait_for_launcher()
            _say(text)
    except BrokenPipeError:
        pass
    finally:
        witness.leave()


if __name__ == "__main__":
    main()
