"""The command line of ``scripts/gpu_check``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_check.check_step import FAILED, PASSED, Step
from benchmarks.gpu_check.reading import json_object
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.running import Runner
from benchmarks.gpu_check.steps import build_steps, choose

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
_BUDGET, _FULL_BUDGET = 300.0, 600.0
_NO_GPU = 2
_DESCRIPTION = """\
Proves and measures on this machine's GPU all that can be, without a network, in five minutes.

It runs with the Python that has the packages: python scripts/gpu_check. Every step is a process
with a time limit; after a failure the next one goes on. Results are in DIR after every step:
gpu_check.jsonl (a line for each), gpu_check.json, gpu_check.md (the table for docs/benchmarks.md).
What a step prints is in DIR/logs/STEP.log while it runs.

Exit codes: 0 all that was run passed, or was refused by name where that is a result; 1 something
failed; 2 wrong arguments, or no GPU.
"""
_MACHINE = Step(
    name="machine",
    title="packages, GPU, driver",
    command=("-m", "benchmarks.gpu_check.machine"),
    expected=1.0,
    limit=90.0,
    figures=json_object,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check.

    Args:
        argv: command line without the program's name; None for the process's own.

    Returns:
        The exit code.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        steps = choose(build_steps(cpu=given.cpu, full=given.full), given.only, given.skip)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for step in steps:
            print(f"{step.name:<24} {step.title}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    budget = given.budget or (_FULL_BUDGET if given.full else _BUDGET)
    command = shlex.join(["scripts/gpu_check", *(sys.argv[1:] if argv is None else argv)])
    record = Record(given.output, command=command, budget=budget)
    jobs = given.jobs or max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        runner = Runner(
            record=record,
            deadline=time.monotonic() + budget,
            root=ROOT,
            work=Path(work),
            environment=_environment(jobs, cpu=given.cpu),
            say=_say,
            jobs=jobs,
            total=len(steps) + 1,
        )
        try:
            return check(runner, steps, cpu=given.cpu)
        except KeyboardInterrupt:
            _say("stopped")
            return 1
        finally:
            _say(f"results: {record.json}, {record.table}, {record.logs}")


def check(runner: Runner, steps: Sequence[Step], *, cpu: bool) -> int:
    """Look at the machine, then run the steps; the exit code."""
    found = runner.run(_MACHINE)
    if found.result != PASSED:
        return 1
    machine: Mapping[str, Any] = found.figures
    runner.record.machine = dict(machine)
    if not machine.get("gpu") and not cpu:
        runner.record.write()
        runner.say(
            "torch sees no GPU on this machine; --cpu tries the check itself with small work"
        )
        return _NO_GPU
    runner.run_all(steps, machine)
    results = [outcome.result for _, outcome in runner.record.outcomes.values()]
    runner.say(", ".join(f"{results.count(kind)} {kind}" for kind in dict.fromkeys(results)))
    return int(FAILED in results)


def _environment(jobs: int, *, cpu: bool) -> dict[str, str]:
    """The environment of the steps: this checkout first, no network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    threads = max(1, min(4, len(os.sched_getaffinity(0)) // (2 * jobs)))
    found = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="more work, in ten minutes")
    parser.add_argument("--list", action="store_true", help="list the steps and exit")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="steps, such as verify.llava.te, or verify",
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="the same, left out")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR", help="for the results"
    )
    parser.add_argument(
        "--budget", type=_seconds, metavar="SECONDS", help="for everything (300; --full: 600)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="steps at once (default: half the cores, at most 6)"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="small work on the CPU: tries the check, not the GPU"
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return value


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)
