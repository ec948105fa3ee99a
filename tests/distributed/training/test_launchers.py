"""Runs that Slurm or an MPI starts are one job, as under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.training.launch import RECIPE, losses, succeed
from tests.rank_pool import RankPool
from tests.time_limits import HANG

SCRIPT = Path(__file__).with_name("other_launcher.py")


@pytest.fixture(scope="module")
def under_torchrun(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    output = tmp_path_factory.mktemp("torchrun")
    succeed(ranks, output, "dp2", "--train-iters", "2")
    return losses(output)


@pytest.mark.parametrize("kind", ["slurm", "open-mpi", "pmi"])
def test_two_processes_train_as_one_job(
    ranks: RankPool, tmp_path: Path, under_torchrun: dict[int, str], kind: str
) -> None:
    argv = [SCRIPT, kind, *RECIPE, "--output", tmp_path, "--train-iters", "2"]
    exits = ranks.script(2, argv, timeout=HANG)
    assert [exit_.exit_code for exit_ in exits] == [0, 0], exits[0].stdout + exits[1].stderr
    assert exits[0].stdout.startswith("recipe tiny: 2 processes (CPU, gloo), tp 1 pp 1 dp 2")
    assert exits[1].stdout + exits[1].stderr == ""
    assert losses(tmp_path) == under_torchrun


def test_half_a_job_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    exits = ranks.script(1, [SCRIPT, "half", *RECIPE, "--output", tmp_path], timeout=HANG)
    assert exits[0].exit_code == 2
    assert exits[0].stderr.startswith("error: WORLD_SIZE=2 is set without RANK; start with torchru")
    assert not list(tmp_path.iterdir())
