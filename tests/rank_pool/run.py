"""The test process's end of one run."""

from __future__ import annotations

import array
import os
import pickle
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from typing import IO

import torch.distributed as dist

from tests.rank_pool.messages import (
    FILES_PER_RANK,
    RankError,
    RankStatus,
    RankValue,
    Refusal,
    Report,
    Request,
    Signal,
    receive,
    send,
)
from tests.rank_pool.outcome import Account, RankExit, RanksFailedError, exits_or_failure

# The supervisor ends a run within its time-out; this is for the case that it has died itself.
_SUPERVISOR_GRACE = 60.0


class Run:
    """One request in flight; holds the rendezvous store, as torchrun's agent does."""

    def __init__(self, control: socket.socket, request: Request, store: dist.TCPStore) -> None:
        self.request = request
        self._store: dist.TCPStore | None = store
        self._report: list[RankStatus] | None = None
        self._kept: list[bytes] = []  # what the files held when the run was let go
        self._files: list[IO[bytes]] = [
            tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close()
            for _ in range(request.world_size * FILES_PER_RANK)
        ]
        mine, theirs = socket.socketpair()
        descriptors = [theirs.fileno(), *(file.fileno() for file in self._files)]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        control.sendmsg([b"r"], [rights])
        theirs.close()
        self._connection = Connection(mine.detach())
        send(self._connection, request)

    def wait(self) -> list[RankStatus]:
        """Blocks until every rank has ended.

        Raises:
            RanksFailedError: the run could not start, or its supervisor died.
        """
        __tracebackhide__ = True
        if self._report is None:
            try:
                if not self._connection.poll(self.request.timeout + _SUPERVISOR_GRACE):
                    raise RanksFailedError("the run's supervisor does not answer")
                message: Report | Refusal = receive(self._connection)
            except EOFError:
                raise RanksFailedError(
                    "the run's supervisor died; see the server's stderr"
                ) from None
            finally:
                self.close()
            if isinstance(message, Refusal):
                raise RanksFailedError(f"the ranks could not be started\n{message.reason}")
            self._report = message.ranks
        return self._report

    def close(self) -> None:
        """Lets go of the run; the supervisor kills what still runs. Output stays readable."""
        self._connection.close()
        self._store = None
        self._kept = self._kept or [_content(file) for file in self._files]
        for file in self._files:
            file.close()

    def finished(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._connection.closed or self._connection.poll(0)

    def signal(self, number: int, rank: int | None) -> None:
        """Sends a signal to one rank or, with None, to all; ranks that have ended get none."""
        send(self._connection, Signal(number=number, rank=rank))

    def read(self, rank: int, file: int) -> bytes:
        """What ``rank`` has written so far to one of its files (see ``FILES_PER_RANK``)."""
        index = rank * FILES_PER_RANK + file
        return self._kept[index] if self._kept else _content(self._files[index])

    def text(self, rank: int, file: int) -> str:
        """``read``, decoded."""
        return self.read(rank, file).decode(errors="replace")

    def accounts(self) -> list[Account]:
        """Waits; everything known about each rank of a function run."""
        return [
            Account(
                rank=rank,
                status=status,
                outcome=self._outcome(rank, status),
                stdout=self.text(rank, 0),
                stderr=self.text(rank, 1),
                stacks=self.text(rank, 3),
            )
            for rank, status in enumerate(self.wait())
        ]

    def _outcome(self, rank: int, status: RankStatus) -> RankValue | RankError | None:
        if not status.reported:
            return None
        outcome: RankValue | RankError = pickle.loads(self.read(rank, 2))
        return outcome


def _content(file: IO[bytes]) -> bytes:
    """All of a file that another process writes, whose offset this process must not move."""
    parts, offset = [], 0
    while part := os.pread(file.fileno(), 1 << 30, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


class ScriptRun:
    """A script that runs on the ranks while the test goes on."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def stdout(self, rank: int = 0) -> str:
        """What ``rank`` has printed so far."""
        return self._run.text(rank, 0)

    def stderr(self, rank: int = 0) -> str:
        """What ``rank`` has written to its standard error so far."""
        return self._run.text(rank, 1)

    def running(self) -> bool:
        """Whether any rank still runs."""
        return not self._run.finished()

    def wait_for(self, text: str, *, rank: int = 0, timeout: float = 60) -> None:
        """Blocks until ``text`` is in ``rank``'s stdout or stderr.

        Raises:
            RanksFailedError: it did not come within ``timeout`` seconds, or the run ended first.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        while True:
            ended = not self.running()  # asked first: what was printed last is seen below
            printed = self.stdout(rank) + self.stderr(rank)
            if text in printed:
                return
            if ended or time.monotonic() > deadline:
                why = "the script ended" if ended else f"{timeout:g} s went by"
                raise RanksFailedError(
                    f"{why} before rank {rank} printed {text!r}; it wrote\n{printed}"
                )
            time.sleep(0.005)

    def signal(self, number: int, *, rank: int | None = None) -> None:
        """Sends a signal to one rank or, with None, to all of them."""
        self._run.signal(number, rank)

    def wait(self) -> list[RankExit]:
        """Blocks until all ranks have ended; exits by rank.

        Raises:
            RanksFailedError: the pool killed the ranks at the run's time-out.
        """
        __tracebackhide__ = True
        exits = []
        for rank, status in enumerate(self._run.wait()):
            assert status.exit_code is not None
            exits.append(
                RankExit(
                    exit_code=status.exit_code,
                    stdout=self.stdout(rank),
                    stderr=self.stderr(rank),
                    stopped=status.stopped,
                    stacks=self._run.text(rank, 3),
                )
            )
        return exits_or_failure(exits, self._run.request.timeout)

    def __enter__(self) -> ScriptRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()
