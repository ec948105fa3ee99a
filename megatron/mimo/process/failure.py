"""How a run ends when something goes wrong: the reason first, then every rank, within seconds."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from typing import NoReturn

from megatron.core.models.mimo.errors import MimoError

__all__ = ["REFUSED", "end_run", "refuse"]

REFUSED = 2  # exit code: the run was not started, its arguments are wrong
_FAILED = 1
_OTHERS_SPEAK_FIRST = 5.0  # seconds that a rank waits where another has the better message

# what a collective says when the rank at its other end has gone
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "connection was closed",
    "Socket closed",
    "Application timeout caused pair closure",
    "remote process exited",
)


def refuse(error: MimoError, rank: int) -> int:
    """Report wrong arguments, which every rank has seen alike, once; returns the exit code.

    Rank 0 prints. The others wait for it a moment: a launcher that sees one rank end stops all.
    """
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_OTHERS_SPEAK_FIRST)
    return REFUSED


def end_run(error: BaseException, rank: int) -> NoReturn:
    """Report a failure of a running job and end this process at once.

    The process is left without clean-up: pending collectives and writer threads could keep it.
    The ranks that wait for this one see its connections close and end as well.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _lost_peer(error):
        time.sleep(_OTHERS_SPEAK_FIRST)
        text = f"[rank {rank}] stopped: another rank has ended (its message says why)"
    else:
        if rank != 0 and isinstance(error, MimoError):
            time.sleep(1.0)  # rank 0 most likely has the same to say
        if not isinstance(error, MimoError) and not is_disk_full(error):
            traceback.print_exception(error)
        text = f"[rank {rank}] error: {describe(error)}"
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
    os._exit(_FAILED)


def describe(error: BaseException) -> str:
    """The error's kind and message; one line for what users can cause."""
    if isinstance(error, MimoError):
        return _said_in_worker(error)
    text = f"{type(error).__name__}: {error}"
    if not str(error) and error.__traceback__ is not None:  # a bare assert: show what it says
        text = f"{type(error).__name__}: {traceback.extract_tb(error.__traceback__)[-1].line}"
    if is_disk_full(error):
        return f"the disk is full ({text}); make room, and the same command continues"
    return text


def _said_in_worker(error: MimoError) -> str:
    """What an error says, without the traceback into which a process that reads data puts it."""
    text = str(error)
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text:
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk (or a quota, or a file size limit) is at the root of an error."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(os.strerror(code) in str(seen) for code in full):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _lost_peer(error: BaseException) -> bool:
    import torch.distributed as dist

    if isinstance(error, MimoError):
        return False
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)
