"""Who has started this process, and what is to happen to it when that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.mimo.process.identity import Process, ancestors

__all__ = ["Launcher", "bind_to_parent", "end_with_parent", "find_launcher"]

_OURS = "megatron.mimo.process.launch"
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_FIRST_WORDS = 4  # of a command line: python -u -m torch.distributed.run
_TASKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOOK = 0.5  # seconds between two looks at a parent
_PR_SET_PDEATHSIG = 1  # Linux: prctl(2)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A process that starts ranks, and without which they have no business.

    Attributes:
        process: it.
        kind: ``torchrun``, ``ours`` (``process.launch``) or ``tasks`` (Slurm, MPI).
        is_parent: whether it has started this process itself, and no script between.
    """

    process: Process
    kind: str
    is_parent: bool


def find_launcher(environment: Mapping[str, str] | None = None) -> Launcher | None:
    """The launcher of this process; None where a person, or something unknown, has started it."""
    environment = os.environ if environment is None else environment
    elastic = "TORCHELASTIC_RUN_ID" in environment
    for place, (process, words) in enumerate(ancestors()):
        first = {os.path.basename(word) for word in words[:_FIRST_WORDS]}
        if elastic and _OURS in first:
            return Launcher(process=process, kind="ours", is_parent=place == 0)
        if elastic and first.intersection(_TORCHRUN):
            return Launcher(process=process, kind="torchrun", is_parent=place == 0)
    alone = environment.get("WORLD_SIZE", "1") == "1"
    if not elastic and not alone and any(name in environment for name in _TASKS):
        return Launcher(process=Process.of(os.getppid()), kind="tasks", is_parent=True)
    return None


def end_with_parent(parent: int) -> None:
    """Look, in a thread, whether ``parent`` still is this process's, and end with it.

    For systems and places where ``bind_to_parent`` cannot.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, name="parent", daemon=True).start()


def bind_to_parent(parent: int) -> bool:
    """Let the kernel kill this process when ``parent``, which has started it, ends.

    The kernel takes the end of the *thread* that started it for the parent's: call it where that
    was the parent's main thread.

    Returns:
        Whether this system can; otherwise somebody has to look.
    """
    if sys.platform != "linux":
        return False
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it has ended in the meantime
        os.kill(os.getpid(), signal.SIGKILL)
    return True
