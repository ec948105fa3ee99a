"""Starts the processes of a job, as torchrun does, with torchrun's own flags and elastic agent.

    python -m megatron.mimo.process.launch --nproc-per-node 2 examples/mimo/pretrain_mimo.py

It differs in how it ends: with the reason as the last line, where torchrun prints a report of its
own, and with exit code 0 where a signal stopped the job and every rank has saved.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.mimo.process.board import Board, boards_of
from megatron.mimo.process.identity import Process, host_name

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["main"]

_SHUTDOWN = "600"  # seconds that ranks get to save in after a signal; torchrun's own are 30
_WITNESS_SPEAKS = 5.0  # seconds in which the witness ends after the ranks
_QUIET = ("torch.distributed.elastic", "torch.distributed.run")


def main(argv: Sequence[str] | None = None) -> int:
    """Start a job and wait for it.

    Args:
        argv: torchrun's flags, a script and its flags; None for the process's own.

    Returns:
        The exit code: 0 where every rank has ended well, also after a signal; else that of the rank
        which failed first, 1 where a signal ended it, 2 where there is no such script, and 128 + N
        where signal N stopped the job before every rank had saved.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # with which a user asks for what torch's agent says
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(_QUIET):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = run.parse_args(list(sys.argv[1:] if argv is None else argv))
    script = arguments.training_script
    if not (arguments.module or arguments.no_python or os.path.isfile(script)):
        _say(
            f"error: there is no script {script}; correct the path (-m takes a module by its name)"
        )
        return 2
    try:
        run.run(arguments)
    except ChildFailedError as error:
        if not _wait_for_verdicts():
            _say(_describe(error))
        return _exit_code(error)
    except SignalException as stop:
        verdicts = _wait_for_verdicts()
        well = bool(verdicts) and all(verdict == "well" for verdict in verdicts)
        return 0 if well else 128 + int(stop.sigval)
    finally:
        for folder in _boards():
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _boards() -> list[Path]:
    return boards_of(Process.of(os.getpid()))


def _wait_for_verdicts() -> list[str]:
    """What the witnesses have found, once they have said it."""
    end = time.monotonic() + _WITNESS_SPEAKS
    boards = [Board(folder) for folder in _boards()]
    while time.monotonic() < end and any(board.witness_lives() for board in boards):
        time.sleep(0.02)
    return [board.verdict_file.read_text() for board in boards if board.verdict_file.exists()]


def _describe(error: ChildFailedError) -> str:
    """The first failure of a script that has no witness."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    return f"error: rank {rank} on {host_name()} (process {failure.pid}) {how}"


def _exit_code(error: ChildFailedError) -> int:
    return max(error.get_first_failure()[1].exitcode, 0) or 1


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
