"""NaN and infinity in training: caught before the update, with their cause, and not for ever."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.distributed.training.launch import losses, succeed, train
from tests.rank_pool import RankPool
from tests.tiers import some

VERDICT = 17  # exit code
# sample 21 is the 6th of iteration 3; a micro-batch has two of them
PLACES = {
    "one": "micro-batch 3 of 4",
    "tp2": "micro-batch 3 of 4",
    "pp2": "micro-batch 3 of 4",
    "dp2": "micro-batch 2 of 2",
}


@pytest.mark.parametrize("layout", some(PLACES, "dp2"))
def test_a_broken_sample_is_named_and_its_repair_goes_on(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--train-iters", "4", "--save-interval", "100")
    succeed(ranks, whole, layout, *flags)
    exits = train(ranks, broken, layout, *flags, "--tiny-fault", "nan:21")
    assert [exit_.exit_code for exit_ in exits] == [VERDICT] * len(exits)
    assert (
        f"error: iteration 3, {PLACES[layout]}: the loss is nan, and again when it was computed a "
        "second time; media of its samples hold values that are not finite: tiny/21; repair these "
        "samples or leave them out; the same command goes on from iteration 2\n"
    ) in exits[0].stderr
    assert "Need to rerun on a different GPU" not in "".join(exit_.stderr for exit_ in exits)
    assert list(losses(broken)) == [1, 2]
    succeed(ranks, broken, layout, *flags)  # repaired
    assert losses(broken) == losses(whole)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "overflow:21",
            "the first output that is not finite is that of "
            "modality_submodules.images.encoders.linear (_Linear); its samples are tiny/20, "
            "tiny/21; look at these samples, lower --lr",
        ),
        ("gradient:21", "micro-batch 3 of 4: a gradient is nan"),
        ("gradient:21", "the first gradient that is not finite is that of the output of "),
    ],
)
def test_the_module_is_named(ranks: RankPool, tmp_path: Path, fault: str, message: str) -> None:
    exits = train(ranks, tmp_path, "one", "--tiny-fault", fault)
    assert exits[0].exit_code == VERDICT
    assert message in exits[0].stderr


def test_the_first_iteration_of_a_process_is_checked_too(ranks: RankPool, tmp_path: Path) -> None:
    exits = train(ranks, tmp_path, "one", "--tiny-fault", "nan:5")
    assert exits[0].exit_code == VERDICT
    assert "error: iteration 1, micro-batch 3 of 4: the loss is nan" in exits[0].stderr
    assert not list(tmp_path.glob("checkpoints/iter_*"))  # there is nothing to go on from
    succeed(ranks, tmp_path, "one", "--train-iters", "2")
    exits = train(ranks, tmp_path, "one", "--train-iters", "4", "--tiny-fault", "nan:21")
    assert "error: iteration 3, micro-batch 3 of 4" in exits[0].stderr
    assert list(losses(tmp_path)) == [1, 2]


def test_without_reruns_samples_are_named(ranks: RankPool, tmp_path: Path) -> None:
    exits = train(ranks, tmp_path, "one", "--rerun-mode", "disabled", "--tiny-fault", "nan:21")
    assert exits[0].exit_code == 1
    assert (
        "error: iteration 3, micro-batch 3 of 4: the loss is nan; media of its samples hold values "
        "that are not finite: tiny/21"
    ) in exits[0].stderr
    assert "Traceback" not in exits[0].stderr
    succeed(ranks, tmp_path / "stats", "one", "--rerun-mode", "report_stats", "--train-iters", "2")


def test_a_verdict_in_a_checkpoint_is_not_taken_over() -> None:
    """Checkpoints of earlier versions hold one, and could not be continued."""
    from megatron.core import rerun_state_machine
    from megatron.mimo.training.nonfinite import ResultWatch
    from megatron.mimo.training.origins import SampleFinder

    waiting = {"state": rerun_state_machine.RerunState.WILL_RERUN_FROM_CHECKPOINT}
    args = Namespace()
    with ResultWatch(args, [], SampleFinder()).installed():
        assert not rerun_state_machine.RerunStateMachine().validate_state_dict(waiting)
    assert rerun_state_machine.RerunStateMachine().validate_state_dict(waiting)
