"""Recipe ``digits_dialled``: two encoders, in all three layouts with the losses of one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import SCRIPT, losses
from tests.rank_pool import RankPool
from tests.time_limits import HANG

FLAGS = (
    *("--recipe", "digits_dialled", "--global-batch-size", "16", "--micro-batch-size", "4"),
    *("--lr-warmup-iters", "1", "--eval-iters", "0", "--log-interval", "1", "--train-iters", "8"),
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "colocated": (2, ("--component", "images=dp=2", "sounds=tp=2", "language=pp=2")),
    "disjoint": (
        4,
        ("--component", "images=dp=1", "sounds=rank_offset=1", "language=dp=2,rank_offset=2"),
    ),
}


def run(ranks: RankPool, output: Path, layout: str, *flags: str) -> None:
    world_size, layout_flags = LAYOUTS[layout]
    argv = [SCRIPT, *FLAGS, "--output", output, *layout_flags, *flags]
    exits = ranks.start_script(world_size, argv, timeout=HANG).wait()
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    assert [exit_.exit_code for exit_ in exits] == [0] * world_size, text


@pytest.mark.wide
def test_every_layout_has_the_same_losses(ranks: RankPool, tmp_path: Path) -> None:
    start = tmp_path / "start"
    run(ranks, start, "one", "--exit-interval", "4")
    found = {}
    for layout in LAYOUTS:
        output = tmp_path / layout
        shutil.copytree(start, output)
        run(ranks, output, layout, "--exit-interval", "6")
        found[layout] = [float(loss) for loss in losses(output).values()]
        assert len(found[layout]) == 6
        assert found[layout] == pytest.approx(found["one"], rel=1e-5), layout
