"""The pool, as a test sees it: ``ranks(2)(function, argument)``."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.rank_pool.messages import FunctionJob, Request, ScriptJob, dumps
from tests.rank_pool.names import ask_no_name_server
from tests.rank_pool.outcome import RankExit, RanksFailedError, values_or_failure
from tests.rank_pool.run import Run, ScriptRun
from tests.rank_pool.server import PRELOAD

_REPOSITORY = Path(__file__).resolve().parents[2]
_START_SECONDS = 180.0
_MAX_RANKS = 32
_FUNCTION_GRACE = 3.0  # for the other ranks to report what they saw of a failure
_MASTER = "127.0.0.1"
# For the server and its ranks: no GPU, and no thread of a numerical library.
_ALONE = {
    "CUDA_VISIBLE_DEVICES": "",
    **{
        f"{library}_NUM_THREADS": "1"
        for library in ("OMP", "MKL", "OPENBLAS", "BLIS", "NUMEXPR", "NUMBA")
    },
}


class RankPool:
    """Runs functions and scripts on N fresh rank processes; the fixture ``ranks`` is one.

    The server starts at the first ``start`` or request, and stops with ``close``.

    Args:
        imports: what the server imports; each rank has it already.
        address: abstract name of a Unix socket, of a server that several test processes share;
            whoever takes the name first starts it, and it stops with the last. None: its own.

    Attributes:
        failure: why there are no ranks to be had from this pool, once that is known.
        threads: words for each idle thread beside which ranks are forked.
    """

    def __init__(self, imports: Sequence[str] = PRELOAD, address: str | None = None) -> None:
        self.failure: str | None = None
        self.threads: list[str] = []
        self._imports = imports
        self._address = address
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._scripts: weakref.WeakSet[Run] = weakref.WeakSet()

    def __call__(self, world_size: int, timeout: float = 60) -> Callable[..., list[Any]]:
        """A caller for ``world_size`` ranks: ``ranks(2)(function, *args, **keywords)``.

        ``function`` is module-level; arguments and results are pickled (tensors too). Each rank
        has torchrun's environment, one thread, seed 0 and a gloo default process group. The
        caller returns the results by rank.

        Raises:
            RanksFailedError: a rank raised, died, or was still running after ``timeout`` seconds.
        """

        _check_world_size(world_size)

        def call(function: Callable[..., Any], /, *args: Any, **keywords: Any) -> list[Any]:
            __tracebackhide__ = True
            job = FunctionJob(
                module=function.__module__,
                path=getattr(sys.modules.get(function.__module__), "__file__", None),
                call=_pickle_call(function, args, keywords),
            )
            run = self._start_run(world_size, job, timeout, _FUNCTION_GRACE, {}, None)
            try:
                return values_or_failure(run.accounts(), timeout)
            finally:
                run.close()

        return call

    def script(
        self,
        world_size: int,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        grace: float = 15,
        cwd: str | os.PathLike[str] | None = None,
    ) -> list[RankExit]:
        """Runs ``argv[0]`` as ``__main__`` on every rank, as torchrun would, and waits.

        Megatron is imported already and the CPU backend applied. When one rank fails the others
        get SIGTERM and, ``grace`` seconds later, SIGKILL.

        Args:
            env: set on top of the test process's environment.
            cwd: working directory; None for the test process's.

        Returns:
            Exit code and output by rank, failures included.

        Raises:
            RanksFailedError: the script was still running after ``timeout`` seconds.
        """
        __tracebackhide__ = True
        return self.start_script(
            world_size, argv, env=env, timeout=timeout, grace=grace, cwd=cwd
        ).wait()

    def start_script(
        self,
        world_size: int,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        grace: float = 15,
        cwd: str | os.PathLike[str] | None = None,
    ) -> ScriptRun:
        """``script`` that returns at once with a handle to read, signal and wait."""
        job = ScriptJob(argv=tuple(os.fspath(argument) for argument in argv))
        run = self._start_run(world_size, job, timeout, grace, env or {}, cwd)
        self._scripts.add(run)
        return ScriptRun(run)

    def start(self) -> None:
        """Starts the server without waiting for its imports; a second call does nothing."""
        if self._control is not None:
            return
        ask_no_name_server()  # the stores of the runs are this process's
        if self._address is None:
            self._control, theirs = socket.socketpair()
            self._server = _start_server(theirs, self._imports)
            return
        door = socket.socket(socket.AF_UNIX)
        try:
            door.bind(self._address)
        except OSError:
            door.close()  # another process has taken it
        else:
            door.listen()
            self._server = _start_server(door, self._imports)
        self._control = _connect(self._address)

    def close(self) -> None:
        """Kills the runs in flight and stops the server; waits for others that use it, too."""
        if self._control is None:
            return
        for run in list(self._scripts):
            run.close()
        self._control.close()
        self._control = None
        if self._server is None:
            return
        patience = None if self._address else 10 if self._ready else _START_SECONDS
        try:
            self._server.wait(patience)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None

    def _start_run(
        self,
        world_size: int,
        job: FunctionJob | ScriptJob,
        timeout: float,
        grace: float,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
    ) -> Run:
        _check_world_size(world_size)
        control = self._ready_control()
        store = dist.TCPStore(_MASTER, 0, is_master=True, wait_for_workers=False)
        request = Request(
            world_size=world_size,
            job=job,
            timeout=timeout,
            grace=grace,
            environment=_environment(world_size, store.port) | dict(env),
            path=(str(_REPOSITORY), *(entry for entry in sys.path if entry)),
            cwd=os.fspath(cwd or os.getcwd()),
        )
        return Run(control, request, store)

    def wait_until_ready(self) -> None:
        """Starts the server if need be and waits for its imports.

        Raises:
            RanksFailedError: there are no ranks to be had; the message says why.
        """
        self.start()
        assert self._control is not None
        if self.failure is None and not self._ready:
            answer = _first_line(self._control)
            self.failure = answer.get("failure")
            self.threads = answer.get("threads", [])
            self._ready = self.failure is None
        if self.failure is None and self._server is not None and self._server.poll() is not None:
            self.failure = f"it died with code {self._server.returncode}; see its stderr"
        if self.failure is not None:
            raise RanksFailedError(f"the rank pool cannot serve: {self.failure}")

    def _ready_control(self) -> socket.socket:
        self.wait_until_ready()
        assert self._control is not None
        return self._control


def _start_server(theirs: socket.socket, imports: Sequence[str]) -> subprocess.Popen[bytes]:
    """A server at ``theirs``, which this process closes."""
    command = "from tests.rank_pool.server import main; "
    command += f"main({theirs.fileno()}, {','.join(imports)!r})"
    environment = os.environ | _ALONE
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", command],
        pass_fds=[theirs.fileno()],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for pytest, which then closes the pool
    )
    theirs.close()
    return server


def _connect(address: str) -> socket.socket:
    """To a server that has taken its address, and listens at the next moment."""
    control = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + _START_SECONDS
    while control.connect_ex(address) != 0:
        if time.monotonic() > deadline:
            raise RanksFailedError("the rank pool cannot serve: nobody is at its address")
        time.sleep(0.01)
    return control


def _first_line(control: socket.socket) -> dict[str, Any]:
    """What the server says once it has imported all, or that it does not."""
    control.settimeout(_START_SECONDS)
    line = b""
    try:
        while not line.endswith(b"\n"):
            chunk = control.recv(65536)
            if not chunk:
                return {"failure": "it died without a word; see its stderr"}
            line += chunk
    except TimeoutError:
        return {"failure": f"its imports did not end within {_START_SECONDS:g} s"}
    control.settimeout(None)
    answer: dict[str, Any] = json.loads(line)
    return answer


def _check_world_size(world_size: int) -> None:
    if not 1 <= world_size <= _MAX_RANKS:
        raise ValueError(f"world size {world_size} is out of range; expected 1 to {_MAX_RANKS}")


def _environment(world_size: int, port: int) -> dict[str, str]:
    """The test process's environment with torchrun's variables, but for the ranks' own."""
    interfaces = {name for _, name in socket.if_nameindex()}
    return {
        **os.environ,
        **({"GLOO_SOCKET_IFNAME": "lo"} if "lo" in interfaces else {}),
        **_ALONE,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": _MASTER,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "rank-pool",
    }


def _pickle_call(function: Callable[..., Any], args: object, keywords: object) -> bytes:
    try:
        return dumps((function, args, keywords))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{function!r} and its arguments cannot be sent to the ranks ({error}); use a function "
            "at the top level of a module, and arguments that pickle"
        ) from error
