"""A plan beside the memory that the same run takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import RankPool
from tests.tiers import some
from tests.time_limits import HANG

HERE = Path(__file__).parent
SHORT = ("--train-iters", "2", "--eval-iters", "0", "--lr-warmup-iters", "0")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
FULL = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
RUNS = {
    "llava": (1, ("--recipe", "llava_tiny", "--stage", "full")),
    "qwen3_vl-tp2": (2, ("--recipe", "qwen3_vl_tiny", *TP2)),
    "gemma3-pp2-bf16": (2, ("--recipe", "gemma3_tiny", "--bf16", *PP2)),
    "experts-zero": (2, ("--recipe", "qwen3_vl_moe_tiny", "--use-distributed-optimizer", *FULL)),
}


@pytest.mark.parametrize("name", some(RUNS, "llava", "qwen3_vl-tp2"))
def test_within_fifteen_percent(ranks: RankPool, tmp_path: Path, name: str) -> None:
    size, flags = RUNS[name]
    argv = [HERE / "measured_run.py", *flags, *SHORT, "--output", tmp_path]
    for exit_ in ranks.start_script(size, argv, timeout=HANG).wait():
        assert exit_.exit_code == 0, exit_.stdout + exit_.stderr
    found = plan(ranks, "--world-size", str(size), *flags, *SHORT)
    stages = found["memory"]
    for rank in range(size):
        measured = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        planned = stages[rank * len(stages) // size]
        for part, bytes_ in measured.items():
            # padding of buffers, and of what is spread over ranks
            assert planned[part] == pytest.approx(bytes_, rel=0.15, abs=4096), part
        whole = sum(planned[part] for part in measured)
        assert whole == pytest.approx(sum(measured.values()), rel=0.15)


def plan(ranks: RankPool, *flags: str) -> dict[str, Any]:
    """The plan of a run, by the command."""
    argv = [HERE / "plan_script.py", "--json", *flags]
    (exit_,) = ranks.start_script(1, argv, timeout=HANG).wait()
    assert exit_.exit_code == 0, exit_.stdout + exit_.stderr
    found: dict[str, Any] = json.loads(exit_.stdout)
    return found
