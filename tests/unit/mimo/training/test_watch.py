"""The loop as it is watched: the curve, evaluations, checkpoints that cannot be loaded."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.process.console import Console
from megatron.mimo.training.curve import LossCurve
from megatron.mimo.training.plans import DataPosition
from megatron.mimo.training.throughput import ThroughputMeter
from megatron.mimo.training.watch import LoopWatch
from tests.rank_pool import RankPool, model_parallel


def watch_of(folder: Path, **settings: Any) -> LoopWatch:
    paths = {"load": str(folder), "save": str(folder)}
    args = Namespace(**paths, checkpoint=None, verbose=False, **settings)
    curve = LossCurve(folder / "loss.csv", writes=True)
    curve.begin(0)
    meter, position = ThroughputMeter([]), DataPosition(args)
    return LoopWatch(args, Console(active=False), curve, meter, position)


def log_three_iterations(folder: Path) -> tuple[str, int, float]:
    """The second has no loss, as a step that fp16 skips."""
    model_parallel()
    watch = watch_of(
        folder,
        consumed_train_samples=0,
        skipped_train_samples=0,
        train_iters=3,
        log_interval=1,
        seq_length=4,
    )
    logged = []
    log = watch._around_log(lambda *args: logged.append(args[3]))
    watch.pace.start()
    for iteration, losses in ((1, {"lm loss": torch.tensor(2.5)}), (2, {}), (3, {})):
        watch._args.consumed_train_samples += 8
        log(losses, {}, 1e-3, iteration)
    assert logged == [1, 2, 3]
    watch._curve.close()
    return (folder / "loss.csv").read_text(), watch.iteration, watch.pace.samples_per_second


def test_every_iteration_stands_in_the_curve(ranks: RankPool, tmp_path: Path) -> None:
    ((text, iteration, speed),) = ranks(1)(log_three_iterations, tmp_path)
    assert text.splitlines() == ["iteration,loss", "1,2.5", "2,nan", "3,nan"]
    assert iteration == 3
    assert speed > 0


def test_the_same_weights_are_evaluated_once(tmp_path: Path) -> None:
    watch = watch_of(tmp_path)
    evaluated: list[str] = []
    evaluate = watch._around_evaluation(evaluated.append)
    watch.pace.start()
    for iteration, prefix in (
        (3, "iteration 3 on validation set"),
        (3, "iteration 3 on validation set"),
        (3, "iteration 3 on test set"),
        (6, "iteration 6 on validation set"),
    ):
        watch.iteration = iteration
        evaluate(prefix)
    assert evaluated == [
        "iteration 3 on validation set",
        "iteration 3 on test set",
        "iteration 6 on validation set",
    ]


def test_why_a_checkpoint_cannot_be_loaded(tmp_path: Path) -> None:
    watch = watch_of(tmp_path)

    def fails(error: Exception) -> Any:
        def load(_: Any) -> Any:
            raise error

        return watch._around_load(load)

    with pytest.raises(ConfigError, match=r"the checkpoint in .* cannot be loaded: .*no such"):
        fails(OSError("no such disk"))([torch.nn.Linear(1, 1)])
    with pytest.raises(InputError, match=r"^another size$"):  # one of ours says all there is to say
        fails(InputError("another size"))([torch.nn.Linear(1, 1)])


def test_where_a_run_goes_on_is_what_it_has_saved(tmp_path: Path) -> None:
    watch = watch_of(tmp_path)
    assert watch._around_load(lambda _: (6, 0.0))([]) == (6, 0.0)
    assert (watch.iteration, watch.saved) == (6, 6)
    elsewhere = watch_of(tmp_path)
    elsewhere._args.save = str(tmp_path / "own")
    elsewhere._around_load(lambda _: (6, 0.0))([])
    assert (elsewhere.iteration, elsewhere.saved) == (6, None)
