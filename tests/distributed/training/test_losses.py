"""A recipe's further loss: in every layout what it is on one process, in the log by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, SCRIPT, losses
from tests.rank_pool import RankPool
from tests.tiers import some
from tests.time_limits import HANG

SEQUENCE_PARALLEL = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": ("--tensor-model-parallel-size", "2"),
    "tp2-sp": SEQUENCE_PARALLEL,
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "cp2": ("--context-parallel-size", "2"),
    "dp2": (),
}
Series = dict[str, list[float]]


def start(ranks: RankPool, output: Path, processes: int, recipe: str, *flags: str) -> None:
    name = f"tests.distributed.training.{recipe}"
    steps = ("--tensorboard-log-interval", "1", "--log-interval", "1")
    argv = [SCRIPT, "--recipe", name, "--output", output, *COMPARABLE, *steps, *flags]
    exits = ranks.script(processes, argv, timeout=HANG)
    assert [exit_.exit_code for exit_ in exits] == [0] * processes, exits[0].stderr


def go_on(ranks: RankPool, begun: Path, output: Path, processes: int, *flags: str) -> Series:
    """The series of every loss, from the file and from TensorBoard, of a run that was begun."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree(begun, output)
    shutil.rmtree(output / "tensorboard")
    start(ranks, output, processes, "headed:headed", "--train-iters", "5", *flags)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    found = {
        tag: [event.value for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.endswith(" loss")
    }
    return {"loss.csv": [float(loss) for loss in losses(output).values()], **found}


@pytest.fixture(scope="module")
def begun(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration: its weights are those of every layout."""
    output = tmp_path_factory.mktemp("begun") / "run"
    start(ranks, output, 1, "headed:headed", "--train-iters", "1")
    return output


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Series:
    return go_on(ranks, begun, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.mark.parametrize("layout", some(LAYOUTS, "tp2-sp", "pp2", "cp2"))
def test_trains_as_one_process(
    ranks: RankPool, begun: Path, tmp_path: Path, one_process: Series, layout: str
) -> None:
    found = go_on(ranks, begun, tmp_path / "run", 2, *LAYOUTS[layout])
    assert found.keys() == one_process.keys()
    for name, series in one_process.items():
        assert found[name] == pytest.approx(series, rel=1e-5), name


def test_the_further_loss_is_trained_and_logged(
    ranks: RankPool, tmp_path: Path, one_process: Series
) -> None:
    start(ranks, tmp_path / "plain", 1, "tiny:tiny", "--train-iters", "5")
    plain = [float(loss) for loss in losses(tmp_path / "plain").values()]
    with_head, counter = one_process["loss.csv"], one_process["counter loss"]
    assert one_process["lm loss"] == pytest.approx(with_head[1:], rel=1e-6)
    assert len(counter) == 4
    assert counter[-1] < 0.7 * counter[0]
    # The first iteration's loss comes before any step, the others after steps by both losses.
    assert plain[0] == pytest.approx(with_head[0], rel=1e-6)
    assert plain[-1] != pytest.approx(with_head[-1], rel=1e-3)
