"""Stock ``pretrain`` on CPU and gloo: trains, evaluates, saves, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rank_pool import RankExit, RankPool
from tests.tiers import some

SCRIPT = Path(__file__).with_name("pretrain_gpt.py")
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 "
    "--lr 1e-2 --vocab-size 63 --log-interval 1 --eval-interval 2 --eval-iters 1 "
    "--calculate-per-token-loss --hidden-dropout 0.1 --attention-dropout 0.1 --num-workers 0"
)
LAYOUTS = {
    "one rank, recomputed": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "TP2 with SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2": (2, "--overlap-grad-reduce --ckpt-fully-parallel-load"),
    "DP2, distributed optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
_MAX_THREADS = 60


def _train(pool: RankPool, world_size: int, flags: str) -> list[RankExit]:
    exits = pool.script(world_size, [SCRIPT, *FLAGS.split(), *flags.split()])
    for exit_ in exits:
        assert exit_.exit_code == 0, exit_.stderr[-4000:]
        assert "CPU RNG state changed" not in exit_.stderr
    return exits


def _lines(exits: list[RankExit], kind: str) -> list[list[str]]:
    return [[line for line in e.stdout.splitlines() if line.startswith(kind)] for e in exits]


@pytest.mark.parametrize("layout", some(LAYOUTS, "PP2", "DP2, distributed optimizer"))
def test_resumed_run_repeats_the_uninterrupted_one(
    layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    whole = _train(ranks, world_size, f"{flags} --save {tmp_path} --save-interval 2")
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    assert latest.read_text().strip() == "4"
    latest.write_text("2")
    resumed = _train(ranks, world_size, f"{flags} --load {tmp_path}")

    for kind in ("LOSS", "EVALUATION"):
        for before, after in zip(_lines(whole, kind), _lines(resumed, kind), strict=True):
            assert len(set(before)) == len(before)
            assert after == before[-len(after) :]
            assert len(after) < len(before) or not before
    assert any(_lines(resumed, "LOSS"))
    assert any(_lines(resumed, "EVALUATION"))
    for threads, processes in zip(_lines(whole, "THREADS"), _lines(whole, "CHILDREN"), strict=True):
        assert int(threads[0].split()[1]) < _MAX_THREADS
        assert processes == ["CHILDREN 0"]  # a save leaves no process of helpers behind


def test_tensor_parallel_peers_compute_one_loss(ranks: RankPool) -> None:
    """With dropout, and although only TP rank 0 iterates over data and draws for it."""
    first, second = _lines(_train(ranks, 2, "--tensor-model-parallel-size 2"), "LOSS")
    assert first
    assert first == second


def test_mixed_precision_and_virtual_stages(ranks: RankPool) -> None:
    flags = "--bf16 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    _, last = _lines(_train(ranks, 2, f"{flags} --num-layers 4 --train-iters 2"), "LOSS")
    assert len(last) == 8
