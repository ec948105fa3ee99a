"""What a run begins with: its own checkpoint, another run's, or nothing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.checkpoints.hashed_saving import hash_checkpoint
from megatron.mimo.checkpoints.tracker import TRACKER, iteration_name
from megatron.mimo.training.starting_point import choose_start
from tests.rank_pool import RankPool, model_parallel


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")


def save(root: Path, iterations: tuple[int, ...]) -> None:
    from megatron.core import dist_checkpointing

    model_parallel()
    for iteration in iterations:
        folder = root / iteration_name(iteration)
        folder.mkdir(parents=True)
        dist_checkpointing.save({"iteration": iteration}, str(folder))
        hash_checkpoint(folder)
    (root / TRACKER).write_text(str(iterations[-1]))


@pytest.fixture
def write(ranks: RankPool) -> Callable[..., Path]:
    """Writes a folder of whole checkpoints, the last of which the tracker names."""

    def written(root: Path, *iterations: int) -> Path:
        ranks(1)(save, root, iterations)
        return root

    return written


Write = Callable[..., Path]


def arguments(save: Path, load: Path | None = None, **changes: Any) -> Namespace:
    settings: dict[str, Any] = {
        "save": str(save),
        "load": str(load or save),
        "explicit_load": load is not None,
        "pretrained_checkpoint": None,
        "ckpt_step": None,
        "finetune": load is not None,
        "exit_on_missing_checkpoint": False,
        "checkpoint_hashes": True,
        "lora": [],
    }
    return Namespace(**settings | changes)


def test_a_run_of_its_own_begins_with_nothing_and_goes_on_with_the_newest(
    write: Write, tmp_path: Path
) -> None:
    args = arguments(tmp_path / "own")
    assert choose_start(args, repair=True) == (None, None)
    assert args.checkpoint is None
    write(tmp_path / "own", 3, 6)
    args = arguments(tmp_path / "own")
    assert choose_start(args, repair=True) == (6, None)
    assert args.checkpoint == str(tmp_path / "own/iter_0000006")


def test_another_run_is_read_once(write: Write, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 9)
    args = arguments(tmp_path / "own", other)
    assert choose_start(args, repair=True) == (9, None)
    assert args.checkpoint == str(other / "iter_0000009")

    write(tmp_path / "own", 3)
    args = arguments(tmp_path / "own", other, ckpt_step=9)
    start, said = choose_start(args, repair=True)
    assert start == 3
    assert (args.load, args.finetune, args.ckpt_step) == (args.save, False, None)
    assert said == (
        f"continuing the run in {args.save}; it began from --load {other}, which is not read again"
    )


def test_weights_of_another_run_are_a_start_at_step_0(write: Write, tmp_path: Path) -> None:
    other = write(tmp_path / "other", 3, 9)
    args = arguments(tmp_path / "own", pretrained_checkpoint=str(other))
    assert choose_start(args, repair=True) == (None, None)
    assert args.checkpoint == str(other / "iter_0000009")


def test_going_back_to_an_iteration_is_said(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "own", 3, 6)
    args = arguments(tmp_path / "own", ckpt_step=3)
    start, said = choose_start(args, repair=True)
    assert start == 3
    assert said == "--ckpt-step: going back to iteration 3, at each start of this command"


def test_a_checkpoint_that_has_to_be_there(tmp_path: Path) -> None:
    args = arguments(tmp_path / "own", exit_on_missing_checkpoint=True)
    with pytest.raises(ConfigError, match="--exit-on-missing-checkpoint: there is no checkpoint"):
        choose_start(args, repair=True)
