"""What a run saved is loaded by the same command, and goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import losses, succeed, train
from tests.rank_pool import RankPool
from tests.tiers import some

ZERO = ("--use-distributed-optimizer",)
TORCH = ("--ckpt-format", "torch")
SGD = ("--optimizer", "sgd")
FROZEN = ("--freeze", "language.decoder.layers.0", "images")
SCALE = ("--initial-loss-scale", "65536")  # the first steps succeed
# what the run is -> layout and flags; five iterations, stopped after the third
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("one", TORCH),
    "torch, distributed optimizer": ("dp2", (*TORCH, *ZERO)),
    "torch, bf16, distributed optimizer": ("one", (*TORCH, *ZERO, "--bf16")),
    "torch, fp16 without a step, distributed optimizer": ("one", (*TORCH, *ZERO, "--fp16")),
    "torch, sgd, TP2": ("tp2", (*TORCH, *SGD)),
    "sgd": ("one", SGD),
    "sgd without momentum": ("one", (*SGD, "--sgd-momentum", "0")),
    "sgd, bf16, PP2": ("pp2", (*SGD, "--bf16")),
    "sgd, fp16 without a step": ("one", (*SGD, "--fp16")),
    "bf16, distributed optimizer": ("dp2", (*ZERO, "--bf16")),
    "fp16": ("one", ("--fp16", *SCALE)),
    "fp16 without a step": ("one", ("--fp16",)),
    "fp16 without a step, PP2": ("pp2", ("--fp16",)),
    "fp16 without a step, distributed optimizer": ("dp2", ("--fp16", *ZERO)),
    "frozen parts, TP2": ("tp2", FROZEN),
    "frozen parts, sgd, fp16 without a step": ("one", (*FROZEN, *SGD, "--fp16")),
    "frozen parts, distributed optimizer": ("dp2", (*FROZEN, *ZERO)),
    "rates": ("one", ("--module-lr", "images=1e-3", "--module-wd", "language=0")),
    "asynchronous": ("one", ("--async-save", *ZERO)),
}


@pytest.mark.parametrize(
    "name",
    some(
        RUNS,
        "bf16, distributed optimizer",
        "fp16 without a step, PP2",
        "frozen parts, distributed optimizer",
        "asynchronous",
    ),
)
def test_a_checkpoint_continues_the_run_exactly(ranks: RankPool, tmp_path: Path, name: str) -> None:
    layout, flags = RUNS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = (*flags, "--train-iters", "5", "--save-interval", "3")
    succeed(ranks, whole, layout, *flags)
    back_to(3, whole, broken)
    assert "iteration 5/5" in succeed(ranks, broken, layout, *flags)
    assert losses(broken) == losses(whole)


def back_to(iteration: int, whole: Path, broken: Path) -> None:
    """Copy a run as if it had ended with this iteration's checkpoint."""
    shutil.copytree(whole, broken)
    (broken / "metrics.json").unlink()
    shutil.rmtree(broken / "checkpoints/iter_0000005")
    (broken / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(iteration))


def test_a_run_without_optimizer_state_says_so_and_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    for flags in (("--no-save-optim", "--no-save-rng"), ("--no-save-rng", *TORCH)):
        output = tmp_path / flags[0]
        succeed(ranks, output, "one", *flags, "--train-iters", "2")
        printed = succeed(ranks, output, "one", *flags, "--train-iters", "3")
        assert "has no state of generators (--no-save-rng): they start anew" in printed
        assert ("has no state of the optimizer" in printed) == ("--no-save-optim" in flags)
        assert "iteration 3/3" in printed


def test_a_run_from_a_step_of_another_goes_on_from_its_own(ranks: RankPool, tmp_path: Path) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    keep = ("--keep-checkpoints", "0", "--save-interval", "2")
    succeed(ranks, other, "one", *keep, "--train-iters", "4")
    command = ("--load", str(other / "checkpoints"), "--ckpt-step", "2", "--train-iters", "6")
    succeed(ranks, mine, "one", *command, "--exit-interval", "5")
    assert list(losses(mine)) == [3, 4, 5]
    before = losses(mine)
    printed = succeed(ranks, mine, "one", *command)
    assert f"continuing the run in {mine}/checkpoints; it began from --load {other}" in printed
    assert list(losses(mine)) == [3, 4, 5, 6]
    assert {number: loss for number, loss in losses(mine).items() if number < 6} == before
    assert f"{losses(mine)[3]}" == losses(other)[3]  # it did begin at step 2


def test_a_command_of_another_model_is_told_what_differs(ranks: RankPool, tmp_path: Path) -> None:
    """What the arguments that are compared do not say is found in the weights."""
    succeed(ranks, tmp_path, "one", "--train-iters", "1")
    exits = train(ranks, tmp_path, "one", "--vocab-size", "48")
    assert exits[0].exit_code == 2
    assert "error: --vocab-size is 48 and the model in" in exits[0].stderr
    exits = train(ranks, tmp_path, "one", "--position-embedding-type", "learned_absolute")
    assert exits[0].exit_code == 1
    error = exits[0].stderr
    assert "Traceback" not in error
    assert "it is of another model: 1 weights of the model are not in it, such as " in error
    assert "language_model.embedding.position_embeddings.weight" in error
    assert "damaged" not in error
    assert len(error) < 600
