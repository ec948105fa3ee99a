"""Runs that go wrong: every rank ends soon, the reason is printed, and nothing is lost."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.training.launch import losses, start, succeed, train, wait_for
from tests.rank_pool import RankExit, RankPool
from tests.tiers import some
from tests.time_limits import SOON

LONG = ("--train-iters", "100000", "--save-interval", "100000")


def printed(exits: list[RankExit]) -> str:
    return "".join(exit_.stdout + exit_.stderr for exit_ in exits)


@pytest.mark.parametrize("layout", some(["one", "tp2", "pp2", "dp2", "apart"], "pp2", "dp2"))
def test_a_sample_that_cannot_be_read_ends_every_rank(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    # sample 10 is in the second half of the second data-parallel pair: rank 1 under DP2
    exits = train(ranks, tmp_path, layout, "--tiny-bad-sample", "10")
    assert all(exit_.exit_code != 0 for exit_ in exits)
    assert all(exit_.stopped != "timeout" for exit_ in exits)
    assert "sample 10 of the training dataset cannot be read" in printed(exits)
    assert "cannot decode image" in printed(exits)
    assert "Traceback" not in printed(exits)


# The rank that is killed; of modules apart, that of the encoder or that of the language model.
KILLED = {"tp2": 1, "pp2": 1, "dp2": 1, "apart": 1, "apart, encoder": 0}


@pytest.mark.parametrize("name", some(KILLED, "tp2", "apart, encoder"))
def test_a_rank_that_dies_takes_the_others_with_it(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    layout, killed = name.partition(",")[0], KILLED[name]
    run = start(ranks, tmp_path, layout, *LONG)
    wait_for(run, lambda: (tmp_path / "loss.csv").is_file() and len(losses(tmp_path)) >= 2)
    run.signal(signal.SIGKILL, rank=killed)
    begin = time.monotonic()
    exits = run.wait()
    assert time.monotonic() - begin < SOON
    assert exits[killed].exit_code == -signal.SIGKILL
    assert exits[1 - killed].exit_code != 0
    assert exits[1 - killed].stopped != "timeout"


@pytest.mark.parametrize(
    ("layout", "number"),
    [
        pytest.param("one", signal.SIGTERM, marks=pytest.mark.wide),
        pytest.param("tp2", signal.SIGTERM, marks=pytest.mark.wide),
        ("pp2", signal.SIGTERM),
        ("dp2", signal.SIGINT),  # the same path
        pytest.param("apart", signal.SIGTERM, marks=pytest.mark.wide),
    ],
)
def test_a_signal_saves_and_leaves(
    ranks: RankPool, tmp_path: Path, layout: str, number: int
) -> None:
    run = start(ranks, tmp_path, layout, *LONG)
    wait_for(run, lambda: (tmp_path / "loss.csv").is_file() and len(losses(tmp_path)) >= 2)
    begin = time.monotonic()
    run.signal(number)
    exits = run.wait()
    assert time.monotonic() - begin < SOON
    assert [exit_.exit_code for exit_ in exits] == [0] * len(exits), printed(exits)
    last = max(losses(tmp_path))
    assert last < 100000
    assert f"checkpoint of iteration {last}" in exits[0].stdout
    assert "Traceback" not in printed(exits)
    assert f"iteration {last + 2}/" in succeed(
        ranks, tmp_path, layout, "--train-iters", str(last + 2)
    )


@pytest.mark.parametrize("layout", some(["one", "dp2", "pp2"], "pp2"))
def test_a_full_disk_keeps_the_earlier_checkpoint(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    # sample 34 belongs to iteration 5; from then on a file cannot exceed 1 MiB
    large = ("--hidden-size", "128")
    exits = train(ranks, tmp_path, layout, *large, "--tiny-disk-full-from", "34")
    assert all(exit_.exit_code != 0 for exit_ in exits)
    assert all(exit_.stopped != "timeout" for exit_ in exits)
    text = printed(exits)
    assert "checkpoint of iteration 6 could not be written" in text
    assert "writing a file failed" in text  # with a disk that is full, it says so
    assert "iteration 3 is intact" in text
    succeed(ranks, tmp_path, layout, *large)
    assert max(losses(tmp_path)) == 6


def test_a_damaged_checkpoint_gives_way_to_the_one_before(ranks: RankPool, tmp_path: Path) -> None:
    succeed(ranks, tmp_path, "one")
    before = losses(tmp_path)
    folder = tmp_path / "checkpoints"
    data = next((folder / "iter_0000006").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    out = succeed(ranks, tmp_path, "one")
    assert "iter_0000006 is damaged" in out
    assert "it is cut off; using the newest complete one, iteration 3" in out
    assert losses(tmp_path) == before
    (folder / "latest_checkpointed_iteration.txt").write_text("")  # killed while writing it
    out = succeed(ranks, tmp_path, "one", "--train-iters", "7")
    assert "using the newest complete one, iteration 6" in out
    assert {k: v for k, v in losses(tmp_path).items() if k < 7} == before
    for path in folder.glob("iter_*"):
        (path / ".metadata").unlink()
    exits = train(ranks, tmp_path, "one", "--train-iters", "8")
    assert exits[0].exit_code == 2
    assert "no complete checkpoint is left" in exits[0].stderr
    shutil.rmtree(folder)


# at a sample, at a forward pass of the last stage -> rank, error, module, what the rank does
FAILING = {
    "encoder:17": (0, "the encoder fails", "images", "encoding"),
    "language:10": (2, "the language model fails", "language stage 1", "forward"),
}


@pytest.mark.parametrize("fault", FAILING)
def test_an_error_names_the_module_and_the_stage(
    ranks: RankPool, tmp_path: Path, fault: str
) -> None:
    """On a rank of one of modules apart; those of the others wait for it."""
    rank, error, module, does = FAILING[fault]
    exits = train(ranks, tmp_path, "apart-pp2", "--tiny-fault", fault)
    assert all(exit_.exit_code != 0 for exit_ in exits)
    assert all(exit_.stopped != "timeout" for exit_ in exits)
    text = printed(exits)
    assert text.index("Traceback") < text.index(f"[rank {rank}] error: ArithmeticError: {error}")
    assert re.search(rf"rank {rank} on .*, {module}, iteration 3, {does}, at ", text), text


def test_wrong_arguments_are_reported_once_by_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    exits = train(ranks, tmp_path, "tp2", "--num-attention-heads", "5", "--hidden-size", "20")
    assert exits[0].exit_code == 2
    assert (
        exits[0].stderr == "error: 5 attention heads cannot be divided by tensor-parallel size 2\n"
    )
    assert exits[1].stdout + exits[1].stderr == ""
    exits = train(ranks, tmp_path, "one", "--freeze", "imagse")
    assert exits[0].exit_code != 0
    assert "imagse" in exits[0].stderr
