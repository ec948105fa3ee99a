"""Recipe ``digits`` goes on in any layout: its vocabulary of 33 is padded to 40 rows, or to 48."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import LAYOUTS, SCRIPT, losses
from tests.rank_pool import RankPool

FLAGS = (
    *("--global-batch-size", "16", "--micro-batch-size", "4", "--lr-warmup-iters", "1"),
    *("--eval-iters", "0", "--log-interval", "1", "--train-iters", "8"),
)


def run(ranks: RankPool, output: Path, layout: str, *flags: str) -> None:
    world_size, layout_flags = LAYOUTS[layout]
    argv = [SCRIPT, "--recipe", "digits", "--output", output, *FLAGS, *layout_flags, *flags]
    exits = ranks.script(world_size, argv)
    assert [exit_.exit_code for exit_ in exits] == [0] * world_size, exits[0].stderr


def test_another_layout_has_the_same_losses(ranks: RankPool, tmp_path: Path) -> None:
    start = tmp_path / "start"
    run(ranks, start, "one", "--exit-interval", "4")
    found = {}
    for layout in ("one", "tp2", "pp2", "dp2"):
        output = tmp_path / layout
        shutil.copytree(start, output)
        run(ranks, output, layout, "--exit-interval", "6")
        found[layout] = [float(loss) for loss in losses(output).values()]
        assert len(found[layout]) == 6
        assert found[layout] == pytest.approx(found["one"], rel=1e-5), layout
