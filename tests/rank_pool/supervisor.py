"""One process per run: forks the ranks, watches them, reports how they ended."""

from __future__ import annotations

import importlib
import importlib.util
import os
import select
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import NoReturn

from tests.rank_pool.messages import (
    FILES_PER_RANK,
    FunctionJob,
    RankStatus,
    Refusal,
    Report,
    Request,
    ScriptJob,
    Signal,
    receive,
    send,
)
from tests.rank_pool.processes import adopt_orphans, send_signal, sweep
from tests.rank_pool.rank import STACK_SIGNAL, run_rank
from tests.rank_pool.threads import BusyThreadsError, come_to_rest

_POLL_SECONDS = 0.05  # between looks at the clock; what happens to a rank is told at once
_DUMP_SECONDS = 0.2  # what a rank gets to write its stacks before it is killed
_SWEEP_SECONDS = 1.0


def supervise(connection: Connection, files: list[int]) -> NoReturn:
    """Serves one run in this freshly forked process and never returns."""
    try:
        adopt_orphans()
        request: Request = receive(connection)
        try:
            run = _Run(request, connection, files)
        except Exception:
            send(connection, Refusal(reason=traceback.format_exc()))
        else:
            send(connection, run.watch())
    except (EOFError, BrokenPipeError):
        pass  # the test process has gone, or lost interest
    except BaseException:
        traceback.print_exc()
    finally:
        sweep([], 0.0)
        os._exit(0)


class _Run:
    """The ranks of one run and what is known about them."""

    def __init__(self, request: Request, connection: Connection, files: list[int]) -> None:
        self.request = request
        self.connection = connection
        self.client_gone = False
        self.is_script = isinstance(request.job, ScriptJob)
        self.status = [RankStatus() for _ in range(request.world_size)]
        self.pids: list[int] = []
        self.reports, report_fd = os.pipe()
        self.ends, end_fd = os.pipe()
        _wake_by_ends(end_fd)
        sys.path[:] = request.path
        if isinstance(request.job, FunctionJob):
            _import_test_module(request.job)
        for rank in range(request.world_size):
            pid = os.fork()
            if pid == 0:
                _wake_by_ends(None)
                for fd in (self.reports, self.ends, end_fd):
                    os.close(fd)
                connection.close()
                own = files[rank * FILES_PER_RANK : (rank + 1) * FILES_PER_RANK]
                for fd in set(files) - set(own):
                    os.close(fd)
                run_rank(request, rank, own, report_fd)
            self.pids.append(pid)
        os.close(report_fd)

    def watch(self) -> Report:
        """Returns once every rank has ended and nothing that they started is left."""
        deadline = time.monotonic() + self.request.timeout
        stop_at: float | None = None  # when the survivors of a failure are killed
        while self._running():
            self._listen()
            self._collect()
            now = time.monotonic()
            if self.client_gone or self._all_reported():
                self._kill(None)
            elif now >= deadline:
                self._kill("timeout")
            elif stop_at is not None and now >= stop_at:
                self._kill("peer")
            elif stop_at is None and self._failed():
                stop_at = now + self.request.grace
                if self.is_script:
                    self._signal_all(signal.SIGTERM, "peer")
        sweep(self.pids, _SWEEP_SECONDS)
        return Report(ranks=self.status)

    def _running(self) -> list[int]:
        return [r for r, status in enumerate(self.status) if status.exit_code is None]

    def _all_reported(self) -> bool:
        return not self.is_script and all(status.reported for status in self.status)

    def _failed(self) -> bool:
        return any(status.exit_code not in (None, 0) for status in self.status)

    def _listen(self) -> None:
        sources: list[Connection | int] = [self.ends]
        if not self.client_gone:
            sources.append(self.connection)
        if not self.is_script and self.reports >= 0:
            sources.append(self.reports)
        ready = select.select(sources, [], [], _POLL_SECONDS)[0]
        if self.ends in ready:
            os.read(self.ends, 4096)
        if self.reports in ready:
            ranks = os.read(self.reports, len(self.status))
            for rank in ranks:
                self.status[rank].reported = True
            if not ranks:  # every rank has closed its end
                os.close(self.reports)
                self.reports = -1
        if self.connection in ready:
            try:
                message: Signal = receive(self.connection)
            except (EOFError, ConnectionResetError):
                self.client_gone = True
                return
            targets = self._running() if message.rank is None else [message.rank]
            for rank in targets:
                if self.status[rank].exit_code is None:
                    send_signal(self.pids[rank], message.number)

    def _collect(self) -> None:
        while self._running():
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.pids:
                ended = self.status[self.pids.index(pid)]
                ended.exit_code = os.waitstatus_to_exitcode(status)
                ended.ended = time.monotonic()

    def _signal_all(self, number: int, stopped: str | None) -> None:
        for rank in self._running():
            self.status[rank].stopped = self.status[rank].stopped or stopped
            send_signal(self.pids[rank], number)

    def _kill(self, stopped: str | None) -> None:
        if stopped is not None:
            self._signal_all(STACK_SIGNAL, stopped)
            time.sleep(_DUMP_SECONDS)
        self._signal_all(signal.SIGKILL, stopped)
        while self._running():
            self._collect()
            time.sleep(0.001)


def _wake_by_ends(fd: int | None) -> None:
    """Writes to ``fd`` whenever a child of this process ends; None: no longer."""
    if fd is not None:
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(-1 if fd is None else fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if fd is None else lambda *_: None)


def _import_test_module(job: FunctionJob) -> None:
    """Imports the function's module once for all ranks.

    Raises:
        RuntimeError: the import left a thread that keeps running.
    """
    if job.module not in sys.modules:
        try:
            importlib.import_module(job.module)
        except ModuleNotFoundError as error:
            if job.path is None or not job.module.startswith(error.name or "\0"):
                raise
            spec = importlib.util.spec_from_file_location(job.module, job.path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[job.module] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    try:
        come_to_rest()
    except BusyThreadsError as error:
        raise RuntimeError(
            f"importing {job.module} left threads: {error}. Ranks are forked after the import; "
            "start threads inside the function instead"
        ) from None
