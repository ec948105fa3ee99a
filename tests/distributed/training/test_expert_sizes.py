"""A run with experts goes on where they are divided over other numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, RECIPE, SCRIPT, losses
from tests.rank_pool import RankPool
from tests.time_limits import HANG

EXPERTS = ("--num-experts", "4", "--disable-bias-linear", "--num-layers", "2")
EP2 = ("--expert-model-parallel-size", "2")
# name -> processes, flags
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "ep2": (2, EP2),
    "ep4": (4, ("--expert-model-parallel-size", "4")),
    "colocated ep2": (2, ("--component", "images=dp=2", "language=dp=2", *EP2)),
    "apart": (2, ("--component", "images=dp=1", "language=rank_offset=1")),
    "apart ep2": (3, ("--component", "images=dp=1", "language=dp=2,rank_offset=1", *EP2)),
}
# Each begins on one process, where weights are drawn.
WAYS = {
    "distributed optimizer": (
        ("--use-distributed-optimizer",),
        ("one", "ep2", "apart ep2", "one"),
    ),
    "plain": ((), ("one", "ep2", "apart", "ep4", "colocated ep2", "one", "apart ep2", "apart")),
    "bf16": (("--bf16",), ("one", "apart ep2", "one", "ep2", "colocated ep2", "ep4")),
}


def run(ranks: RankPool, output: Path, layout: str, last: int, *flags: str) -> None:
    world, own = LAYOUTS[layout]
    argv = [SCRIPT, *RECIPE, "--output", output, *COMPARABLE, *EXPERTS, *own, *flags]
    # It is left before its end, and so evaluates nothing.
    argv += ["--train-iters", "20", "--exit-interval", str(last)]
    exits = ranks.start_script(world, argv, timeout=HANG).wait()
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    assert [exit_.exit_code for exit_ in exits] == [0] * world, text


@pytest.mark.wide
@pytest.mark.parametrize("name", WAYS)
def test_a_run_goes_on(ranks: RankPool, tmp_path: Path, name: str) -> None:
    flags, layouts = WAYS[name]
    for number, layout in enumerate(layouts):
        run(ranks, tmp_path / "moved", layout, 2 + number, *flags)
    run(ranks, tmp_path / "straight", "one", 1 + len(layouts), *flags)
    found, expected = (
        [float(loss) for loss in losses(tmp_path / folder).values()]
        for folder in ("moved", "straight")
    )
    assert len(found) == 1 + len(layouts)
    assert found == pytest.approx(expected, rel=2e-2 if name == "bf16" else 1e-5)
