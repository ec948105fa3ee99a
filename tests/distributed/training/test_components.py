"""Runs whose modules have grids of their own, through the example: --component."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, EVALUATE, RECIPE, SCRIPT, losses, succeed
from tests.rank_pool import RankPool
from tests.time_limits import HANG

TWO_LAYERS = ("--tiny-two-layers",)  # of the encoder
FOUR_LAYERS = ("--num-layers", "4", "--micro-batch-size", "1", "--global-batch-size", "4")
# name -> processes, components, further flags
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "pp2": (2, ("images=dp=2", "language=pp=2"), ()),
    "tp2-zero": (
        2,
        ("images=dp=2", "language=tp=2"),
        ("--use-distributed-optimizer", "--sequence-parallel"),
    ),
    "cp2": (2, ("images=dp=2", "language=cp=2"), ("--encoder-activations", "recompute")),
    "dp2-images-tp2": (2, ("images=tp=2", "language=dp=2"), ()),
    "pp2-dp2-zero": (
        4,
        ("images=dp=4", "language=pp=2,dp=2"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "vpp2": (
        2,
        ("images=dp=2", "language=pp=2"),
        ("--num-layers-per-virtual-pipeline-stage", "1"),
    ),
    "apart-images pp2": (3, ("images=pp=2", "language=rank_offset=2"), TWO_LAYERS),
    "apart-vpp2": (
        4,
        ("language=pp=2", "images=dp=2,rank_offset=2"),
        (*TWO_LAYERS, "--num-layers-per-virtual-pipeline-stage", "1"),
    ),
    "apart-zero": (
        4,
        ("images=tp=2", "language=dp=2,rank_offset=2"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
}


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    succeed(ranks, output, "one", *COMPARABLE, *EVALUATE, *FOUR_LAYERS, "--train-iters", "7")
    return output


def run(ranks: RankPool, output: Path, name: str, last: int, *further: str) -> str:
    world, components, flags = LAYOUTS[name]
    argv = [SCRIPT, *RECIPE, "--output", output, *COMPARABLE, *EVALUATE, *FOUR_LAYERS, *flags]
    argv += [*further, "--component", *components, "--train-iters", str(last)]
    exits = ranks.start_script(world, argv, timeout=HANG).wait()
    text = "".join(exit_.stdout + exit_.stderr for exit_ in exits)
    assert [exit_.exit_code for exit_ in exits] == [0] * world, text
    return exits[0].stdout


def test_a_run_moves_between_uniform_and_colocated_layouts(
    ranks: RankPool, one_process: Path, tmp_path: Path
) -> None:
    """Weights, optimizer and data position survive, also into the distributed optimizer."""
    begin = (*COMPARABLE, *EVALUATE, *FOUR_LAYERS)
    succeed(ranks, tmp_path, "one", *begin, "--train-iters", "2")
    run(ranks, tmp_path, "pp2", 3)
    run(ranks, tmp_path, "cp2", 4)
    printed = run(ranks, tmp_path, "vpp2", 5)
    assert "iteration 5/5" in printed
    assert "accuracy" in printed
    run(ranks, tmp_path, "dp2-images-tp2", 6)
    succeed(ranks, tmp_path, "tp2", *begin, "--train-iters", "7")
    _same_losses(tmp_path, one_process)
    answers = [
        json.loads((p / "metrics.json").read_text())["answers"] for p in (tmp_path, one_process)
    ]
    assert answers[0] == answers[1]


@pytest.mark.wide
def test_the_distributed_optimizer_moves_too(
    ranks: RankPool, tmp_path: Path, one_process: Path
) -> None:
    begin = (*COMPARABLE, *EVALUATE, *FOUR_LAYERS, "--use-distributed-optimizer")
    run(ranks, tmp_path, "apart-zero", 2)  # whose first weights are those of one process
    run(ranks, tmp_path, "pp2-dp2-zero", 4)
    run(ranks, tmp_path, "tp2-zero", 6)
    succeed(ranks, tmp_path, "dp2", *begin, "--train-iters", "7")
    _same_losses(tmp_path, one_process)


@pytest.mark.wide
def test_a_run_moves_between_disjoint_and_other_layouts(ranks: RankPool, tmp_path: Path) -> None:
    """Encoders before and behind the language model's ranks, in stages, beside interleaved ones."""
    begin = (*COMPARABLE, *EVALUATE, *FOUR_LAYERS, *TWO_LAYERS)
    expected, found = tmp_path / "one", tmp_path / "several"
    succeed(ranks, expected, "one", *begin, "--train-iters", "6")
    succeed(ranks, found, "one", *begin, "--train-iters", "2")
    printed = run(ranks, found, "apart-images pp2", 3)
    assert "iteration 3/3" in printed
    assert "not evaluated by generation" in printed
    printed = run(ranks, found, "apart-images pp2", 3)
    assert "already trained 3 iterations; pass --train-iters larger than 3" in printed
    assert "without --component say, evaluates this checkpoint" in printed
    assert "recipe tiny" not in printed  # nothing is built or loaded
    assert "evaluating ..." in succeed(ranks, found, "one", *begin, "--train-iters", "3")
    assert "answers" in json.loads((found / "metrics.json").read_text())
    run(ranks, found, "apart-vpp2", 5)
    assert _operations(found) == _operations(expected)
    succeed(ranks, found, "pp2", *begin, "--train-iters", "6")
    _same_losses(found, expected)


@pytest.mark.wide
@pytest.mark.parametrize("layout", ["pp2", "apart-images pp2"])
def test_a_run_that_stops_between_steps_of_frozen_encoders_repeats_the_bits(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    """They have encoded a part of the next step, which is evaluated before; or they have not."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(ranks, straight, layout, 4, "--freeze", "images", "--exit-interval", "4")
    run(ranks, stopped, layout, 4, "--freeze", "images", "--exit-interval", "2")
    run(ranks, stopped, layout, 4, "--freeze", "images", "--no-encode-ahead")
    assert len(losses(stopped)) == 4
    assert losses(stopped) == losses(straight)


def _operations(output: Path) -> float:
    """Of an iteration, whose batches are alike."""
    throughput = json.loads((output / "metrics.json").read_text())["throughput"]
    return float(throughput["tflop_per_iteration"])


def _same_losses(found: Path, expected: Path) -> None:
    assert {n: float(loss) for n, loss in losses(found).items()} == pytest.approx(
        {n: float(loss) for n, loss in losses(expected).items()}, rel=1e-5
    )


def test_the_layout_is_shown(ranks: RankPool, tmp_path: Path) -> None:
    argv = [SCRIPT, *RECIPE, "--output", tmp_path / "none", "--show-layout"]
    argv += ["--component", "images=tp=1,dp=2", "--component", "language=pp=2"]
    exits = ranks.script(2, argv)
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stderr
    assert re.search(r"^images +dp0 +dp1$", exits[0].stdout, re.MULTILINE)
    assert re.search(r"^language +pp0 +pp1$", exits[0].stdout, re.MULTILINE)
    assert not (tmp_path / "none").exists()


REFUSED = {
    "other modules": (("pictures=dp=2", "language=pp=2"), "the model has the modules"),
    "stages of encoders": (("images=pp=2", "language=pp=2"), "give them ranks of their own"),
    "other size": (("images=dp=2", "language=pp=1"), "give all modules the same ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(ranks: RankPool, tmp_path: Path, case: str) -> None:
    components, text = REFUSED[case]
    argv = [SCRIPT, *RECIPE, "--output", tmp_path, "--component", *components]
    exits = ranks.start_script(2, argv, timeout=HANG).wait()
    assert all(exit_.exit_code for exit_ in exits)
    assert text in "".join(exit_.stdout + exit_.stderr for exit_ in exits)
