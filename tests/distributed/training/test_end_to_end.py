"""Whole runs of the example script on the rank pool, with a recipe of a few thousand parameters."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.rank_pool import RankExit, RankPool

SCRIPT = Path(__file__).parents[3] / "examples/mimo/pretrain_mimo.py"
RECIPE = ("--recipe", "tests.distributed.training.tiny:tiny")
# dropout draws differ between layouts
COMPARABLE = (
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
    *("--make-vocab-size-divisible-by", "4"),  # 24 rows with and without TP2
)
EVALUATE = ("--eval-iters", "2", "--eval-interval", "3")
LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "dp2": (2, ()),
    "dp2-zero": (2, ("--use-distributed-optimizer",)),
}


def train(ranks: RankPool, output: Path, layout: str, *flags: str) -> list[RankExit]:
    world_size, layout_flags = LAYOUTS[layout]
    argv = [SCRIPT, *RECIPE, "--output", output, *layout_flags, *flags]
    return ranks.script(world_size, argv, timeout=60)


def succeed(ranks: RankPool, output: Path, layout: str, *flags: str) -> str:
    exits = train(ranks, output, layout, *flags)
    assert [exit_.exit_code for exit_ in exits] == [0] * len(exits), exits
    return exits[0].stdout


def losses(output: Path) -> dict[int, str]:
    lines = (output / "loss.csv").read_text().splitlines()
    assert lines[0] == "iteration,loss"
    return {int(number): loss for number, loss in (line.split(",") for line in lines[1:])}


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


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_killed_and_restarted_is_bit_identical(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(ranks, whole, layout)
    world_size, layout_flags = LAYOUTS[layout]
    argv = [SCRIPT, *RECIPE, "--output", broken, *layout_flags]
    run = ranks.start_script(world_size, argv, timeout=60)
    _wait_for(lambda: (broken / "loss.csv").is_file() and len(losses(broken)) >= 4)
    run.signal(signal.SIGKILL)
    run.wait()
    succeed(ranks, broken, layout)
    assert losses(broken) == losses(whole)


def _wait_for(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.01)


def _tensorboard_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])
