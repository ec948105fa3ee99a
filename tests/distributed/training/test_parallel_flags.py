"""Megatron's flags for interleaving, uneven stages and recomputation, through the example."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, RECIPE, SCRIPT, losses, succeed
from tests.rank_pool import RankPool
from tests.tiers import some

FOUR_LAYERS = ("--num-layers", "4", "--micro-batch-size", "1", "--global-batch-size", "4")
# model -> flags of a layout of two processes
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "interleaved": (
        FOUR_LAYERS,
        (
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1"),
        ),
    ),
    # Every chunk reads the batches: they count once.
    "interleaved, packed": (
        (*FOUR_LAYERS, "--pack", "--seq-length", "48", "--max-position-embeddings", "48"),
        (
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1"),
        ),
    ),
    "uneven stages": (
        FOUR_LAYERS,
        (
            *("--pipeline-model-parallel-size", "2"),
            *("--pipeline-model-parallel-layout", "Et|tttL"),
        ),
    ),
    "recomputed": (
        FOUR_LAYERS,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "2"),
        ),
    ),
}


@pytest.mark.parametrize("name", some(RUNS, "interleaved, packed"))
def test_trains_as_one_process(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Both go on from one checkpoint, so that their weights are the same."""
    model, layout = RUNS[name]
    start, one, two = tmp_path / "start", tmp_path / "one", tmp_path / "two"
    succeed(ranks, start, "one", *COMPARABLE, *model, "--train-iters", "1")
    shutil.copytree(start, one)
    shutil.copytree(start, two)
    more = (*COMPARABLE, *model, "--train-iters", "4")
    succeed(ranks, one, "one", *more)
    argv = [SCRIPT, *RECIPE, "--output", two, *more, *layout]
    exits = ranks.script(2, argv)
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stdout + exits[0].stderr
    found, expected = losses(two), losses(one)
    assert list(found) == list(expected)
    assert [*map(float, found.values())] == pytest.approx(
        [*map(float, expected.values())], rel=1e-5
    )
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["answers"] == metrics[1]["answers"]
    counted = ("tokens_per_iteration", "padding_share")
    assert [metrics[0]["throughput"][name] for name in counted] == pytest.approx(
        [metrics[1]["throughput"][name] for name in counted], rel=1e-5
    )
