"""Runs of other lengths and ends: in samples, with skipped iterations, with a NaN, by a signal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.distributed.training.launch import EVALUATE, losses, start, succeed, wait_for
from tests.rank_pool import RankPool


def test_a_length_in_samples(ranks: RankPool, tmp_path: Path) -> None:
    flags = ("--train-samples", "48", *EVALUATE)
    printed = succeed(ranks, tmp_path, "dp2", *flags)
    assert "global batch 8, 6 iterations, 48 samples" in printed.splitlines()[0]
    assert printed.count("iteration 6  validation") == 1
    printed = succeed(ranks, tmp_path, "dp2", *flags)
    assert "already trained 6 iterations; pass --train-samples larger than 48" in printed
    assert "validation" not in printed
    assert max(losses(tmp_path)) == 6


def test_the_last_iteration_is_skipped(ranks: RankPool, tmp_path: Path) -> None:
    flags = ("--iterations-to-skip", "2", "6", "--train-iters", "6")
    succeed(ranks, tmp_path, "one", *flags)
    assert json.loads((tmp_path / "metrics.json").read_text())["iteration"] == 6
    assert list(losses(tmp_path)) == [1, 3, 4, 5]
    assert "already trained 6 iterations" in succeed(ranks, tmp_path, "one", *flags)


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_nan_is_shown_as_one(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    # sample 10 belongs to iteration 2
    flags = ("--tiny-fault", "nan:10", "--no-check-for-nan-in-loss-and-grad")
    printed = succeed(ranks, tmp_path, layout, *flags)
    assert "iteration 2/6  loss nan" in printed
    assert losses(tmp_path)[2] == "nan"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_too(ranks: RankPool, tmp_path: Path, number: int) -> None:
    flags = ("--train-iters", "100000", "--save-interval", "100000", "--num-workers", "2")
    run = start(ranks, tmp_path, "one", *flags)
    wait_for(run, lambda: (tmp_path / "loss.csv").is_file() and len(losses(tmp_path)) >= 4)
    events = next((tmp_path / "tensorboard").iterdir())
    os.killpg(int(events.name.split(".")[-2]), number)  # the rank leads a group with its workers
    exits = run.wait()
    assert exits[0].exit_code == 0, exits[0].stdout + exits[0].stderr
    assert exits[0].stdout.count("saving a checkpoint and leaving") == 1
    assert exits[0].stderr == ""
    last = max(losses(tmp_path))
    assert (tmp_path / f"checkpoints/iter_{last:07d}").is_dir()
