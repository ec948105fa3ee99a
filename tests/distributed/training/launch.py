"""Starts runs of the example script on the rank pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.rank_pool import RankExit, RankPool, ScriptRun
from tests.time_limits import HANG

SCRIPT = Path(__file__).parents[3] / "examples/mimo/pretrain_mimo.py"
RECIPE = ("--recipe", "tests.distributed.training.tiny:tiny")
# Dropout draws differ between layouts. The vocabulary is padded to 24 rows, and under TP2 to 32.
COMPARABLE = ("--hidden-dropout", "0", "--attention-dropout", "0")
EVALUATE = ("--eval-iters", "2", "--eval-interval", "3")
LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "dp2": (2, ()),
    "dp2-zero": (2, ("--use-distributed-optimizer",)),
    "apart": (2, ("--component", "images=dp=1", "language=rank_offset=1")),
    "apart-pp2": (3, ("--component", "images=dp=1", "language=pp=2,rank_offset=1")),
}
# layouts that cut sequences, or have a stage between the first and the last
SEQUENCE_LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "tp2-cp2": (
        4,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--context-parallel-size", "2"),
        ),
    ),
    "pp3": (3, ("--pipeline-model-parallel-size", "3")),
}


def start(ranks: RankPool, output: Path, layout: str, *flags: str) -> ScriptRun:
    """Start the example script in ``layout``."""
    world_size, layout_flags = {**LAYOUTS, **SEQUENCE_LAYOUTS}[layout]
    argv = [SCRIPT, *RECIPE, "--output", output, *layout_flags, *flags]
    return ranks.start_script(world_size, argv, timeout=HANG)


def train(ranks: RankPool, output: Path, layout: str, *flags: str) -> list[RankExit]:
    """Run the example script in ``layout`` and wait."""
    return start(ranks, output, layout, *flags).wait()


def succeed(ranks: RankPool, output: Path, layout: str, *flags: str) -> str:
    """``train`` that has to succeed; returns what rank 0 printed."""
    exits = train(ranks, output, layout, *flags)
    assert [exit_.exit_code for exit_ in exits] == [0] * len(exits), "\n".join(
        exit_.stdout + exit_.stderr for exit_ in exits
    )
    return exits[0].stdout


def losses(output: Path) -> dict[int, str]:
    """Iteration -> training loss, as written."""
    lines = (output / "loss.csv").read_text().splitlines()
    assert lines[0] == "iteration,loss"
    return {int(number): loss for number, loss in (line.split(",") for line in lines[1:])}


def wait_for(run: ScriptRun, condition: Callable[[], bool], seconds: float = HANG) -> None:
    """Poll until ``condition`` holds, while the run goes on."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.running(), run.stdout() + run.stderr()
        assert time.monotonic() < end, run.stdout() + run.stderr()
        time.sleep(0.005)
