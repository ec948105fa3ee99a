"""bf16 with parameters gathered while layers run: the same run, straight, resumed and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, losses, succeed
from tests.rank_pool import RankPool

REDUCED = (*COMPARABLE, "--bf16", "--overlap-grad-reduce", "--train-iters", "6")
GATHERED = (*REDUCED, "--overlap-param-gather")


@pytest.mark.wide
def test_gathering_while_layers_run_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """Bit for bit: on a resumed run's first step no hook waits, and the sums are the same."""
    plain, straight, resumed = (tmp_path / name for name in ("plain", "straight", "resumed"))
    succeed(ranks, plain, "dp2-zero", *REDUCED)
    succeed(ranks, straight, "dp2-zero", *GATHERED)
    succeed(ranks, resumed, "dp2-zero", *GATHERED, "--exit-interval", "3")
    succeed(ranks, resumed, "dp2-zero", *GATHERED)
    assert losses(straight) == losses(plain)
    assert losses(resumed) == losses(plain)
