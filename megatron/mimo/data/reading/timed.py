"""Calls with a limit in time, made in a process of their own, which is killed at the limit.

A decoder is C code: neither a signal handler nor a thread of its own process can stop it. The
process is forked at the first call, serves all later ones, and ends with the process that calls.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron.core.models.mimo.errors import InputError, MimoError
from megatron.mimo.process.children import left_to_parent, start_reading

__all__ = ["Timed"]

_ARENA = 256 << 20  # bytes of address space for results; only what is used takes memory


class Timed:
    """A function whose calls are limited in time.

    Args:
        function: takes and returns what can be pickled.
        seconds: that a call may take.
    """

    def __init__(self, function: Callable[[Any], Any], seconds: float) -> None:
        self._function = function
        self._seconds = seconds
        self._owner = 0  # the process that started the other
        self._child = 0
        self._pipe: Connection | None = None
        self._arena: mmap.mmap | None = None

    def __call__(self, argument: Any, name: str) -> Any:
        """The function's value.

        Args:
            argument: of the function.
            name: of the argument, for errors.

        Raises:
            TimeoutError: the call took too long; the message says what to do.
            InputError: the process that it ran in has died, for example by a fault of a decoder.
            MimoError: what the function raised.
        """
        if self._owner != os.getpid() or self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(argument)
            if not self._pipe.poll(self._seconds):
                self._end()
                raise TimeoutError(
                    f"{name}: takes more than --sample-timeout {self._seconds:g} s to read, and "
                    "its decoder was killed; replace its media, raise the limit, or leave such "
                    "ones out with --on-bad-sample skip"
                )
            kind, value, sizes = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            status = self._end(died=True)
            raise InputError(
                f"{name}: the process that reads it died{status}, by a fault of a decoder or for "
                "want of memory; replace its media"
            ) from error
        if kind == "error":
            raise value
        return self._loaded(value, sizes)

    def _start(self) -> None:
        self._arena = mmap.mmap(-1, _ARENA)
        mine, theirs = multiprocessing.Pipe()
        with left_to_parent():
            child = os.fork()
            if not child:
                mine.close()
                _serve(self._function, theirs, self._arena)
        theirs.close()
        self._owner, self._child, self._pipe = os.getpid(), child, mine

    def _end(self, *, died: bool = False) -> str:
        """Kill the process; if it had ended before, say how in words."""
        assert self._pipe is not None
        self._pipe.close()
        self._pipe, self._arena = None, None
        if not died:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        return _how_it_ended(self._child)

    def _loaded(self, data: bytes, sizes: list[int]) -> Any:
        assert self._arena is not None
        buffers, at = [], 0
        for size in sizes:
            buffers.append(bytearray(memoryview(self._arena)[at : at + size]))
            at += size
        return pickle.loads(data, buffers=buffers)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_owner": 0,
            "_child": 0,
            "_pipe": None,
            "_arena": None,
        }


class _Pickler(pickle.Pickler):
    """Tensors go as NumPy arrays, whose memory is not copied into the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _serve(function: Callable[[Any], Any], pipe: Connection, arena: mmap.mmap) -> None:
    """Answer calls until the other side is gone; never returns."""
    code = 1
    try:
        start_reading(0)
        while True:
            try:
                argument = pipe.recv()
            except (EOFError, ConnectionError):
                code = 0
                break
            pipe.send(_answer(function, argument, arena))
    finally:
        os._exit(code)  # nothing of the process that was forked is this one's to clean up


def _answer(
    function: Callable[[Any], Any], argument: Any, arena: mmap.mmap
) -> tuple[str, Any, list[int]]:
    try:
        value = function(argument)
    except MimoError as error:
        return "error", _portable(error), []
    except Exception as error:  # noqa: BLE001 - the other side is waiting
        return "error", InputError(f"{type(error).__name__}: {error}"), []
    buffers: list[memoryview] = []
    room = _ARENA

    def outside(buffer: pickle.PickleBuffer) -> bool:
        """Put a buffer into the arena where it fits; True leaves it in the pickle."""
        nonlocal room
        raw = buffer.raw()
        if raw.nbytes > room:
            return True
        room -= raw.nbytes
        buffers.append(raw)
        return False

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=outside).dump(value)
    at = 0
    for raw in buffers:
        arena[at : at + raw.nbytes] = raw
        at += raw.nbytes
    return "value", file.getvalue(), [raw.nbytes for raw in buffers]


def _portable(error: MimoError) -> MimoError:
    """An error without what it was raised from, which may not survive the way."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class makes of that
        return InputError(str(error))
    return error


def _how_it_ended(child: int) -> str:
    """Collect a child that ends; "" where the kernel does not let go of it within a second."""
    for _ in range(100):
        try:
            pid, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            return ""
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return f" of {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        time.sleep(0.01)
    return ""
