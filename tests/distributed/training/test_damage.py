"""Runs whose checkpoints were damaged: every rank goes back to the same whole one, or none does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from tests.chaos.damage import become_folder, become_pipe, flip
from tests.distributed.training.launch import RECIPE, losses, succeed, train
from tests.rank_pool import RankPool
from tests.tiers import some
from tests.time_limits import HANG

OTHER_LAUNCHER = Path(__file__).with_name("other_launcher.py")
LAST, EARLIER = "iter_0000006", "iter_0000003"
TRACKER = "latest_checkpointed_iteration.txt"
# what the run is -> layout and flags
RUNS = {
    "two ranks": ("dp2", ()),
    "distributed optimizer, asynchronous": ("dp2-zero", ("--async-save",)),
    "pipeline stages, torch": ("pp2", ("--ckpt-format", "torch")),
}


def copy(run: Path, to: Path) -> Path:
    """A finished run that looks as if it had been killed after its last checkpoint."""
    shutil.copytree(run, to)
    (to / "metrics.json").unlink()
    return to / "checkpoints"


@pytest.mark.parametrize("name", some(RUNS, "two ranks"))
def test_a_flipped_bit_costs_one_checkpoint(ranks: RankPool, tmp_path: Path, name: str) -> None:
    layout, flags = RUNS[name]
    succeed(ranks, tmp_path / "run", layout, *flags)
    succeed(ranks, tmp_path / "straight", layout, *flags, "--train-iters", "8")
    root = copy(tmp_path / "run", tmp_path / "again")
    named = json.loads((root / LAST / "hashes.json").read_text())["files"]
    found = {path.relative_to(root / LAST).as_posix() for path in (root / LAST).rglob("*.*")}
    assert {file for file in found if (root / LAST / file).is_file()} == {"hashes.json", *named}
    file = sorted(file for file in named if file.endswith((".distcp", ".pt")))[-1]
    flip(root / LAST / file, Random(3))
    exits = train(ranks, tmp_path / "again", layout, *flags, "--train-iters", "8")
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stderr + exits[1].stderr
    assert exits[0].stdout.count(f"{LAST} is damaged: {file} has the hash ") == 1
    assert f"expected {named[file]['hash']}: its bytes have changed since" in exits[0].stdout
    assert "using the newest complete one, iteration 3" in exits[0].stdout
    assert exits[1].stdout + exits[1].stderr == ""
    assert losses(tmp_path / "again") == losses(tmp_path / "straight")
    assert succeed(ranks, tmp_path / "again", layout, *flags, "--train-iters", "8").count("\n") < 9


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that is finished."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    succeed(ranks, folder, "dp2")
    return folder


def test_what_cannot_be_written_over_is_cleared_away(
    ranks: RankPool, tmp_path: Path, run: Path
) -> None:
    root = copy(run, tmp_path / "run")
    become_pipe(root / LAST / "__0_0.distcp", Random(0))
    become_folder(root / LAST / "metadata.json", Random(0))
    become_folder(root / TRACKER, Random(0))
    printed = succeed(ranks, tmp_path / "run", "dp2")
    assert f"{TRACKER} is damaged: it is not a file; checkpoint " in printed
    assert f"{LAST} is damaged: metadata.json is not a file" in printed
    assert losses(tmp_path / "run") == losses(run)
    assert (root / TRACKER).read_text() == "6"
    assert (root / f"{TRACKER}.damaged").is_dir()
    assert (root / LAST / "__0_0.distcp").is_file()


def test_none_that_is_whole_is_an_error_on_every_rank(
    ranks: RankPool, tmp_path: Path, run: Path
) -> None:
    root = copy(run, tmp_path / "run")
    flip(root / LAST / "__1_0.distcp", Random(0))
    exits = train(ranks, tmp_path / "run", "dp2", "--ckpt-step", "6")
    assert exits[0].exit_code == 2
    assert exits[0].stderr.startswith("error: iteration 6 was asked for: checkpoint ")
    assert "__1_0.distcp has the hash " in exits[0].stderr
    assert exits[0].stderr.count("\n") == 1
    flip(root / EARLIER / "__0_0.distcp", Random(0))
    exits = train(ranks, tmp_path / "run", "dp2")
    assert exits[0].exit_code == 2
    assert exits[0].stderr.count("has the hash ") == 2
    assert "no complete checkpoint is left there" in exits[0].stderr
    assert exits[0].stdout + exits[1].stdout + exits[1].stderr == ""


def test_hashes_can_be_left_away(ranks: RankPool, tmp_path: Path) -> None:
    off = ("--no-checkpoint-hashes",)
    succeed(ranks, tmp_path, "one", *off, "--train-iters", "1")
    assert not list(tmp_path.rglob("hashes.json"))
    assert "unchecked" not in succeed(ranks, tmp_path, "one", *off, "--train-iters", "2")
    assert "bytes are unchecked" in succeed(ranks, tmp_path, "one", "--train-iters", "3")
    assert "unchecked" not in succeed(ranks, tmp_path, "one", "--train-iters", "4")


def test_ranks_agree_without_a_store_of_their_launcher(
    ranks: RankPool, tmp_path: Path, run: Path
) -> None:
    root = copy(run, tmp_path / "run")
    flip(root / LAST / "__1_0.distcp", Random(0))
    argv = [OTHER_LAUNCHER, "open-mpi", *RECIPE, "--output", tmp_path / "run"]
    exits = ranks.script(2, argv, timeout=HANG)
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stderr + exits[1].stderr
    assert "using the newest complete one, iteration 3" in exits[0].stdout
    assert losses(tmp_path / "run") == losses(run)
    exits = ranks.script(2, argv, timeout=HANG)
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stderr + exits[1].stderr
    assert "already trained 6 iterations" in exits[0].stdout
    assert exits[1].stdout + exits[1].stderr == ""
