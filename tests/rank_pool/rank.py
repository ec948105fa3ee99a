"""What happens inside one forked rank."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import pickle
import random
import runpy
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import NoReturn

import numpy
import torch
import torch.distributed as dist

from tests.rank_pool.messages import FunctionJob, RankError, RankValue, Request, ScriptJob, dumps
from tests.rank_pool.processes import die_with_parent

STACK_SIGNAL = signal.SIGUSR2  # makes a rank write the stacks of its threads to its stacks file


def run_rank(request: Request, rank: int, files: list[int], report_fd: int) -> NoReturn:
    """Turns this freshly forked process into ``rank`` and never returns.

    Args:
        request: what to run.
        rank: 0-based.
        files: descriptors of stdout, stderr, result, stacks.
        report_fd: the pipe into which the rank's number goes once its result is written.
    """
    code = 70  # EX_SOFTWARE: the pool itself failed
    try:
        die_with_parent()
        os.setsid()
        _redirect(files)
        _enter_environment(request, rank)
        if isinstance(request.job, ScriptJob):
            code = _run_script(request.job)
        else:
            code = _run_function(request, request.job, files[2])
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(report_fd, bytes([rank]))
            if code == 0:
                signal.pause()  # stay for the others' sake; the supervisor ends the whole run
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(files: list[int]) -> None:
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(file=files[3])
    faulthandler.register(STACK_SIGNAL, file=files[3], all_threads=True)


def _enter_environment(request: Request, rank: int) -> None:
    os.environ.clear()
    os.environ.update(request.environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.path[:] = request.path
    os.chdir(request.cwd)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _run_function(request: Request, job: FunctionJob, result_fd: int) -> int:
    outcome: RankValue | RankError
    try:
        function, args, keywords = pickle.loads(job.call)
        # The pool's own time-out comes first: it says where every rank is.
        dist.init_process_group("gloo", timeout=timedelta(seconds=request.timeout + 60))
        outcome = RankValue(value=function(*args, **keywords))
        data = dumps(outcome)
    except BaseException as error:
        outcome = RankError(when=time.monotonic(), traceback=_format(error))
        data = dumps(outcome)
    with open(result_fd, "wb", closefd=False) as file:
        file.write(data)
    return 0 if isinstance(outcome, RankValue) else 1


def _format(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    # Without a frame of its own (the result would not pickle, say), the pool's frames explain it.
    return "".join(traceback.format_exception(error.with_traceback(frames or error.__traceback__)))


def _run_script(job: ScriptJob) -> int:
    sys.argv = list(job.argv)
    sys.path.insert(0, os.path.dirname(os.path.abspath(job.argv[0])))
    code = 0
    try:
        runpy.run_path(job.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What the interpreter does at its end, short of unloading modules.
    threading._shutdown()  # type: ignore[attr-defined]  # there is no public name for it
    atexit._run_exitfuncs()
    return code


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1
