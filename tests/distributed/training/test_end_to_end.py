"""Whole runs of the example script on the rank pool, with a recipe of a few thousand parameters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.training.launch import (
    COMPARABLE,
    EVALUATE,
    LAYOUTS,
    RECIPE,
    SCRIPT,
    SEQUENCE_LAYOUTS,
    losses,
    start,
    succeed,
    train,
    wait_for,
)
from tests.rank_pool import RankPool
from tests.tiers import some
from tests.time_limits import HANG


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("one")
    succeed(ranks, output, "one", *COMPARABLE, *EVALUATE, "--train-iters", "9")
    return output


def test_a_run_leaves_everything_a_user_looks_for(one_process: Path) -> None:
    metrics = json.loads((one_process / "metrics.json").read_text())
    assert metrics["iteration"] == 9
    assert metrics["points"] == 9
    assert len(metrics["answers"]) == 9
    assert metrics["train_seconds"] > 0
    assert metrics["samples_per_second"] > 0
    assert list(losses(one_process)) == list(range(1, 10))
    assert (one_process / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "9"
    tags = _tensorboard_tags(one_process / "tensorboard")
    assert {"lm loss", "learning-rate", "grad-norm", "accuracy validation"} <= tags


def test_a_run_moves_from_layout_to_layout(
    ranks: RankPool, one_process: Path, tmp_path: Path
) -> None:
    """Weights, optimizer and data position survive one -> TP2 -> PP2 -> DP2."""
    for layout, last in (("one", 3), ("tp2", 5), ("pp2", 7), ("dp2", 9)):
        printed = succeed(
            ranks, tmp_path, layout, *COMPARABLE, *EVALUATE, "--train-iters", str(last)
        )
        assert f"iteration {last}/{last}" in printed
        assert "accuracy" in printed
    expected = {number: float(loss) for number, loss in losses(one_process).items()}
    found = {number: float(loss) for number, loss in losses(tmp_path).items()}
    assert found == pytest.approx(expected, rel=1e-5)
    mine, reference = (
        json.loads((path / "metrics.json").read_text()) for path in (tmp_path, one_process)
    )
    assert mine["answers"] == reference["answers"]


@pytest.mark.wide
def test_packed_runs_agree_in_every_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Several samples in each sequence; the middle pipeline stage reads where they end."""
    packed = (
        *("--pack", "--seq-length", "48", "--max-position-embeddings", "48"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--num-layers", "3"),
    )
    start, found, answers = tmp_path / "start", {}, {}
    succeed(ranks, start, "one", *COMPARABLE, *packed, "--train-iters", "1")
    for layout in ("one", *SEQUENCE_LAYOUTS):
        output = tmp_path / layout
        shutil.copytree(start, output)
        succeed(ranks, output, layout, *COMPARABLE, *packed, "--train-iters", "3")
        found[layout] = {number: float(loss) for number, loss in losses(output).items()}
        answers[layout] = json.loads((output / "metrics.json").read_text())["answers"]
    for layout in SEQUENCE_LAYOUTS:
        assert found[layout] == pytest.approx(found["one"], rel=1e-5), layout
        assert answers[layout] == answers["one"], layout


@pytest.mark.parametrize("layout", some(LAYOUTS, "dp2-zero"))
def test_killed_and_restarted_is_bit_identical(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(ranks, whole, layout)
    run = start(ranks, broken, layout)
    wait_for(run, lambda: (broken / "loss.csv").is_file() and len(losses(broken)) >= 4)
    run.signal(signal.SIGKILL)
    run.wait()
    succeed(ranks, broken, layout)
    assert losses(broken) == losses(whole)


@pytest.mark.wide
def test_killed_while_a_checkpoint_is_written(ranks: RankPool, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(ranks, whole, "dp2")
    run = start(ranks, broken, "dp2")
    wait_for(run, (broken / "checkpoints/iter_0000003").is_dir)
    run.signal(signal.SIGKILL)
    run.wait()
    succeed(ranks, broken, "dp2")
    assert losses(broken) == losses(whole)


def test_a_finished_run_says_so_and_continues_when_asked(
    ranks: RankPool, one_process: Path
) -> None:
    before = losses(one_process)
    printed = succeed(ranks, one_process, "one", *COMPARABLE, *EVALUATE, "--train-iters", "9")
    assert "already trained 9 iterations; pass --train-iters larger than 9" in printed
    printed = succeed(ranks, one_process, "one", *COMPARABLE, *EVALUATE, "--train-iters", "10")
    assert "iteration 10/10" in printed
    assert {k: v for k, v in losses(one_process).items() if k < 10} == before
    kept = sorted(path.name for path in (one_process / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000009", "iter_0000010"]  # the last two


def test_an_evaluation_that_was_cut_off_is_made_up_for(ranks: RankPool, tmp_path: Path) -> None:
    exits = train(ranks, tmp_path, "one", "--tiny-die-at-finish")
    assert exits[0].exit_code == 9
    assert not (tmp_path / "metrics.json").exists()
    printed = succeed(ranks, tmp_path, "one")
    assert "evaluating" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["iteration"] == 6


def _tensorboard_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.wide  # three interpreters, and so are those of a launcher in test_endings
def test_torchrun_itself(tmp_path: Path) -> None:
    """Real processes from a real launcher, with nothing imported before."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *(str(SCRIPT), *RECIPE, "--output", str(tmp_path), "--train-iters", "2"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command,
        cwd=SCRIPT.parents[2],
        env=environment | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("recipe tiny: 2 processes (CPU, gloo), tp 1 pp 1 dp 2")
    assert run.stderr == ""
    assert list(losses(tmp_path)) == [1, 2]
