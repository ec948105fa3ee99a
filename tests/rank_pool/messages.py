"""What the test process, the supervisor and the ranks say to each other."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

FILES_PER_RANK = 4  # stdout, stderr, result, stacks: the order in which descriptors are sent


@dataclass(frozen=True, kw_only=True)
class FunctionJob:
    """Call a module-level function on every rank.

    Attributes:
        module: name of the module, as the test process knows it.
        path: its file, for a module that cannot be imported by name.
        call: pickled ``(function, args, keywords)``.
    """

    module: str
    path: str | None
    call: bytes


@dataclass(frozen=True, kw_only=True)
class ScriptJob:
    """Run a file as ``__main__`` on every rank; ``argv[0]`` is the file."""

    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run.

    Attributes:
        timeout: seconds after which the supervisor dumps every rank's stack and kills them.
        grace: seconds that the other ranks get once one has failed; a script's ranks are sent
            SIGTERM at its start, as torchrun does.
        environment: the ranks' whole environment, but for RANK and LOCAL_RANK.
        path: ``sys.path`` of the test process.
    """

    world_size: int
    job: FunctionJob | ScriptJob
    timeout: float
    grace: float
    environment: dict[str, str]
    path: tuple[str, ...]
    cwd: str


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Test process to supervisor: send ``number`` to ``rank`` (None: every rank)."""

    number: int
    rank: int | None


@dataclass(kw_only=True)
class RankStatus:
    """How one rank ended.

    Attributes:
        exit_code: as ``subprocess`` gives it (negative for a signal); None while it runs.
        ended: ``time.monotonic()`` when the supervisor saw the end.
        reported: a function's result or error has been written.
        stopped: why the supervisor ended it: "timeout", "peer" (another rank failed) or None.
    """

    exit_code: int | None = None
    ended: float = 0.0
    reported: bool = False
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Supervisor to test process, the last message of a run: how each rank ended."""

    ranks: list[RankStatus]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Supervisor to test process instead of a report: the run could not start; a traceback."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RankError:
    """A rank's result file when its function raised.

    Attributes:
        when: ``time.monotonic()`` at the exception; ranks of one run are ordered by it.
        traceback: formatted, without the frames of the pool.
    """

    when: float
    traceback: str


@dataclass(frozen=True, kw_only=True)
class RankValue:
    """A rank's result file when its function returned."""

    value: Any


class _TensorPickler(pickle.Pickler):
    """Pickles tensors so that they load where megatron.core is not imported.

    megatron.core replaces torch's loader of storages by its own, and every pickle made since then
    imports megatron.core when it is loaded: seconds, in a test process that has no other need.
    """

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, torch.storage.TypedStorage):
            return NotImplemented
        return load_storage, (bytes(_octets(value._untyped_storage.cpu()).numpy()), value.dtype)


def load_storage(data: bytes, dtype: torch.dtype) -> torch.storage.TypedStorage:
    """The other half of a pickled tensor, which is on the CPU."""
    untyped = torch.UntypedStorage(0)
    if data:
        untyped = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _octets(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def dumps(value: object) -> bytes:
    """Pickles a call or a result, tensors included, without shared memory."""
    buffer = io.BytesIO()
    _TensorPickler(buffer).dump(value)
    return buffer.getvalue()


def send(connection: Connection, message: object) -> None:
    """Sends by plain pickle; ``Connection.send`` would put tensors into shared memory."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Receives what ``send`` sent. Raises EOFError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())
