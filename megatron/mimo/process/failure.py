"""How a run ends when something goes wrong: what happened, then the reason, once, within seconds.

The reason is the last line of the job's output. Where a witness watches (``process/witness.py``)
the ranks leave it to it, for torchrun's own report comes after all that a rank can print.
"""

from __future__ import annotations

import dis
import errno
import os
import re
import signal
import sys
import time
import traceback
from types import TracebackType
from typing import NoReturn

from megatron.core.models.mimo.errors import InputError, MimoError
from megatron.mimo.process import presence
from megatron.mimo.process.stacks import Frame, innermost

__all__ = [
    "REFUSED",
    "EchoedError",
    "describe",
    "end_run",
    "last_word",
    "refuse",
    "unexpected_exit",
]

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
# where torch notices, in whatever line this process is, that a process which reads has ended
_ANYWHERE = os.path.join("data", "_utils", "signal_handling.py")
_RAISES = {dis.opmap[name] for name in ("RAISE_VARARGS", "RERAISE")}
_FRAME_IN_TEXT = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class EchoedError(InputError):
    """What another rank has raised, and reports itself."""


def refuse(error: MimoError, rank: int) -> int:
    """Report wrong arguments, which every rank has seen alike, once; returns the exit code.

    Rank 0 prints. The others wait for it a moment: a launcher that sees one rank end stops all.
    """
    last_word("refused", f"error: {error}", prints=rank == 0)
    if rank != 0:
        time.sleep(_OTHERS_SPEAK_FIRST)
    return REFUSED


def last_word(kind: str, text: str, *, prints: bool = True) -> None:
    """Say why this rank ends: through the witness where there is one, else on standard error.

    Args:
        kind: as in ``process.board.Word``.
        text: one line.
        prints: whether this rank is the one that prints it where nobody else does.
    """
    here = presence.here()
    watched = here.watched()
    sys.stdout.flush()
    if not watched and prints:
        print(text, file=sys.stderr, flush=True)
    here.say(kind, text, printed=not watched)


def end_run(error: BaseException, rank: int) -> NoReturn:
    """Report a failure of a running job and end this process at once.

    The process is left without clean-up: pending collectives and writer threads could keep it.
    The ranks that wait for this one see its connections close and end as well.
    """
    # torch's handler of SIGCHLD raises in whatever line this process is, when a reader has ended
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    here = presence.here()
    if lost_peer(error) or isinstance(error, EchoedError):
        end = time.monotonic() + _OTHERS_SPEAK_FIRST
        told = here.others_failed()
        while not told and time.monotonic() < end:
            time.sleep(0.05)
            told = here.others_failed()
        text = f"[rank {rank}] stopped: another rank has ended, and says why if it can: {error}"
        last_word("lost", text, prints=not told)
    else:
        if rank != 0 and isinstance(error, MimoError):
            time.sleep(1.0)  # rank 0 most likely has the same to say
        if not _says_all(error) and not is_disk_full(error):
            traceback.print_exception(error)
        at = origin(error)
        where = here.where() + (f", at {at}" if at is not None else "")
        last_word("failed", f"[rank {rank}] error: {describe(error)} [{where}]")
    os._exit(_FAILED)


def _says_all(error: BaseException) -> bool:
    """Whether an error is of a kind that a person can act on without a traceback.

    What an encoder raises may be a fault of its code as well as of its inputs.
    """
    if isinstance(error, SystemExit):
        return True
    of_code = isinstance(error.__cause__, TypeError | IndexError | AttributeError | RuntimeError)
    return isinstance(error, MimoError) and not (of_code and isinstance(error, InputError))


def describe(error: BaseException) -> str:
    """The error's kind and message; one line for what users can cause."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) was called within the run, which is not complete"
    if isinstance(error, MimoError):
        return _said_in_worker(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "DataLoader worker process" in lines[0]:
        text = lines[-1]  # behind the traceback of the process that reads
    else:
        text = ": ".join([type(error).__name__, *lines[:1]])
    if not lines and error.__traceback__ is not None:  # a bare assert: show what it says
        text = f"{type(error).__name__}: {traceback.extract_tb(error.__traceback__)[-1].line}"
    if is_disk_full(error):
        return f"the disk is full ({text}); make room, and the same command continues"
    return text


def unexpected_exit(leaving: SystemExit) -> bool:
    """Whether another than Megatron's loop and argparse has called ``sys.exit``."""
    frames = traceback.extract_tb(leaving.__traceback__)
    if not frames:
        return False
    file = frames[-1].filename.replace(os.sep, "/")
    return not file.endswith("/argparse.py") and "/megatron/training/" not in file


def origin(error: BaseException) -> Frame | None:
    """Where an error began: the innermost line of its first cause that is no library's."""
    first, seen = error, {id(error)}
    while first.__cause__ is not None and id(first.__cause__) not in seen:
        first = first.__cause__
        seen.add(id(first))
    found = [
        Frame(file=file, line=int(line), function=function)
        for file, line, function in _FRAME_IN_TEXT.findall(str(first))  # of a process that reads
    ]
    if not found and first.__traceback__ is not None:
        found = [
            Frame(file=frame.filename, line=frame.lineno or 0, function=frame.name)
            for frame in traceback.extract_tb(first.__traceback__)
        ]
        if found and found[-1].file.endswith(_ANYWHERE):
            return None
    return innermost(found[::-1])


def lost_peer(error: BaseException) -> bool:
    """Whether a collective has failed because the rank at its other end has gone.

    The words alone do not tell: such an error is raised by torch itself, and by no line of Python.
    """
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistNetworkError | dist.DistBackendError):
            return True
        if type(seen) is RuntimeError and not _raised_in_python(seen.__traceback__):
            return any(text in str(seen) for text in _LOST_PEER)
        seen = seen.__cause__
    return False


def _raised_in_python(frames: TracebackType | None) -> bool:
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    if frames is None:
        return True
    return frames.tb_frame.f_code.co_code[frames.tb_lasti] in _RAISES


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
