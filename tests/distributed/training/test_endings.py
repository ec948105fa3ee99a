"""How jobs end: the cause comes last, once; a folder has one owner; nobody is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.mimo.process.board import Board, boards_of
from megatron.mimo.process.identity import Process
from tests.distributed.training.launch import (
    RECIPE,
    SCRIPT,
    losses,
    start,
    succeed,
    train,
    wait_for,
)
from tests.rank_pool import RankPool
from tests.time_limits import HANG, SOON

LONG = ("--train-iters", "100000", "--save-interval", "100000")
TORCHRUN, OURS = "torch.distributed.run", "megatron.mimo.process.launch"


def launch(module: str, output: Path, *flags: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start a job of real processes; everything that they print goes one way."""
    root = str(SCRIPT.parents[2])
    return subprocess.Popen(
        [
            *(sys.executable, "-m", module, "--standalone", "--nproc-per-node", str(processes)),
            *(str(SCRIPT), *RECIPE, "--output", str(output), *flags),
        ],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_it_trains(job: subprocess.Popen[str], output: Path) -> None:
    end = time.monotonic() + HANG
    while not (output / "loss.csv").is_file() or len(losses(output)) < 2:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def lines_of(text: str) -> Sequence[str]:
    return text.rstrip("\n").splitlines()


@pytest.mark.wide  # three interpreters; the test below has other ends, without torchrun's report
def test_the_cause_stands_behind_torchruns_own_report(tmp_path: Path) -> None:
    # sample 18 is read by rank 1
    job = launch(TORCHRUN, tmp_path, "--train-iters", "50", "--tiny-end", "segv:18")
    text, _ = job.communicate(timeout=HANG)
    assert job.returncode == 1
    assert "ChildFailedError" in text
    assert lines_of(text)[-1].startswith("error: rank 1 on ")
    assert " was ended by SIGSEGV in iteration 3, reading data, at " in lines_of(text)[-1]
    assert "tiny.py:" in lines_of(text)[-1]
    assert sum(line.startswith(("error:", "[rank")) for line in lines_of(text)) == 1


@pytest.mark.wide
def test_a_signal_to_our_launcher_saves_and_ends_well(tmp_path: Path) -> None:
    job = launch(OURS, tmp_path, *LONG)
    until_it_trains(job, tmp_path)
    job.send_signal(signal.SIGTERM)
    text, _ = job.communicate(timeout=HANG)
    assert job.returncode == 0, text
    assert text.startswith("recipe tiny: 2 processes (CPU, gloo), tp 1 pp 1 dp 2"), text
    last = max(losses(tmp_path))
    assert lines_of(text)[-1].startswith(f"stopped at iteration {last} by SIGTERM: checkpoint of ")
    assert "Traceback" not in text
    assert (tmp_path / f"checkpoints/iter_{last:07d}/metadata.json").is_file()
    assert not (tmp_path / ".owner").exists()


@pytest.mark.wide
def test_ranks_end_with_a_launcher_that_is_killed(ranks: RankPool, tmp_path: Path) -> None:
    """Each by itself: one is enough."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--train-iters", "100000", "--save-interval", "3")
    job = launch(TORCHRUN, broken, *flags, processes=1)
    until_it_trains(job, broken)
    (board,) = boards_of(Process.of(job.pid))
    (process,) = (slot.process for slot in Board(board).slots().values())
    job.kill()
    text, _ = job.communicate(timeout=SOON)  # which the ranks hold open as long as they live
    assert not process.lives()
    assert lines_of(text)[-1].startswith(f"error: the launcher (process {job.pid}) has ended with")
    last = max(losses(broken)) + 2
    succeed(ranks, broken, "one", "--train-iters", str(last))  # it takes the folder over
    succeed(ranks, whole, "one", "--train-iters", str(last))
    assert losses(broken) == losses(whole)


def test_a_folder_in_which_a_run_writes_is_refused_on_every_rank(
    ranks: RankPool, tmp_path: Path
) -> None:
    run = start(ranks, tmp_path, "one", *LONG)
    wait_for(run, lambda: (tmp_path / "loss.csv").is_file() and len(losses(tmp_path)) >= 2)
    before = losses(tmp_path)
    exits = train(ranks, tmp_path, "dp2", *LONG)
    assert exits[0].exit_code == 2
    assert exits[1].exit_code != 0  # 2 or, where the pool is the first to end it, a signal's
    assert f"error: {tmp_path} belongs to a run that is going on: process " in exits[0].stderr
    assert exits[1].stdout + exits[1].stderr == ""
    assert before.items() <= losses(tmp_path).items()
    run.signal(signal.SIGTERM)
    assert run.wait()[0].exit_code == 0
    last = max(losses(tmp_path))
    assert sorted(losses(tmp_path)) == list(range(1, last + 1))
    succeed(ranks, tmp_path, "one", "--train-iters", str(last + 1))


@pytest.mark.parametrize("how", ["refused", "sys.exit", "kill"])
def test_the_cause_is_named_once_whatever_it_says(
    ranks: RankPool, tmp_path: Path, how: str
) -> None:
    exits = train(ranks, tmp_path, "dp2", "--tiny-end", f"{how}:18")
    assert all(exit_.exit_code != 0 for exit_ in exits)
    assert all(exit_.stopped != "timeout" for exit_ in exits)
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    causes = [line for line in text.splitlines() if line.startswith(("error:", "[rank"))]
    assert len(causes) == 1, text
    said = {
        "refused": "[rank 1] error: sample 18 of the training dataset cannot be read: RuntimeError:"
        " Connection refused [rank 1 on ",
        "sys.exit": "[rank 1] error: sys.exit(0) was called within the run, which is not complete",
        "kill": "error: rank 1 on ",
    }
    assert causes[0].startswith(said[how])
    assert "iteration 3, reading data" in causes[0]
    assert "checkpoint of iteration None" not in text


def test_a_killed_reader_is_the_reason_and_not_the_connections_that_break(
    ranks: RankPool, tmp_path: Path
) -> None:
    exits = train(ranks, tmp_path, "dp2", "--num-workers", "1", "--tiny-end", "kill:18")
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    causes = [line for line in text.splitlines() if line.startswith(("error:", "[rank"))]
    assert len(causes) == 1, text
    # torch hears of it by a signal or by looking, and words the two differently
    assert "[rank 1] error: RuntimeError: DataLoader worker (pid" in causes[0]
    assert "killed by signal: Killed" in causes[0] or "exited unexpectedly" in causes[0]
