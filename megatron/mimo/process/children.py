"""Processes that a rank starts: they leave signals to it, and end when it does.

A scheduler, ``timeout`` and a terminal signal every process of a job at once. What reads samples or
writes a checkpoint for a rank has to live until the rank has saved, and no longer than the rank.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from types import FrameType

from megatron.mimo.process.parents import bind_to_parent, end_with_parent

__all__ = ["left_to_parent", "start_reading"]

_LEFT = frozenset({signal.SIGTERM, signal.SIGINT})
# ids of this process: once ready, while it starts children; whether its main thread does
_state = {"installed": 0, "parent": 0, "by_main_thread": 0}


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
    _state["by_main_thread"] = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        _state["parent"] = 0
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_reading(_: int) -> None:
    """Prepare a process that reads data; for ``DataLoader(worker_init_fn=...)``."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was there before need not be looked through again and again
    for number in _LEFT:  # handled and not blocked, for what it starts itself inherits a mask
        signal.signal(number, _nothing)
        signal.siginterrupt(number, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT)


def _in_child() -> None:
    if not _state["parent"]:
        return
    parent, _state["parent"] = _state["parent"], 0
    # the kernel takes the end of the thread that started this process for the end of the parent
    if not (_state["by_main_thread"] and bind_to_parent(parent)):
        end_with_parent(parent)


def _end_children() -> None:
    # torch's handler takes the death of a process that reads for a failure of this one
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _nothing(_: int, __: FrameType | None) -> None:
    pass
