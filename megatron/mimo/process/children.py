"""Processes that a rank starts: they leave signals to it, and end when it does.

A scheduler, ``timeout`` and a terminal signal every process of a job at once. What reads samples or
writes a checkpoint for a rank has to live until the rank has saved, and no longer than the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import FrameType

__all__ = ["left_to_parent", "start_reading"]

_LEFT = frozenset({signal.SIGTERM, signal.SIGINT})
_PR_SET_PDEATHSIG = 1  # Linux: prctl(2)
_state = {"installed": 0, "parent": 0}  # ids of this process: once ready, while it starts children


@contextmanager
def left_to_parent() -> Iterator[None]:
    """Processes that are started within this context do not die of SIGTERM and Ctrl-C.

    They are killed when this process ends, whatever they are doing, and however it ends. Signals
    to this process wait until the context is left.
    """
    pid = os.getpid()
    if _state["installed"] == 0:
        os.register_at_fork(after_in_child=_in_child)
    if _state["installed"] != pid:  # multiprocessing would wait for each child at the end
        Finalize(None, _end_children, exitpriority=100)
    _state["installed"] = pid
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT)
    _state["parent"] = pid
    try:
        yield
    finally:
        _state["parent"] = 0
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_reading(_: int) -> None:
    """What a process that reads data begins with (``DataLoader(worker_init_fn=...)``)."""
    import torch

    torch.set_num_threads(1)
    for number in _LEFT:  # handled and not blocked, for what it starts itself inherits a mask
        signal.signal(number, _nothing)
        signal.siginterrupt(number, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT)


def _bind_to_parent(parent: int) -> None:
    """Let the kernel kill this process when ``parent``, which has started it, ends."""
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has ended in the meantime
            os.kill(os.getpid(), signal.SIGKILL)


def _in_child() -> None:
    if _state["parent"]:
        parent, _state["parent"] = _state["parent"], 0
        _bind_to_parent(parent)


def _end_children() -> None:
    # torch's handler takes the death of a process that reads for a failure of this one
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _nothing(_: int, __: FrameType | None) -> None:
    pass
