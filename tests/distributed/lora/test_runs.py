"""Runs of the example script with adapters, learning rates by part, and parts frozen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.training.launch import COMPARABLE, losses, start, succeed, train
from tests.rank_pool import RankPool

LORA = ("--lora", "language", "--lora-rank", "4")
RATES = (
    *("--module-lr", "language=2e-3", "language.decoder.layers.1=5e-3", "images.encoders=3e-2"),
    *("--module-wd", "language.output_layer=0.3"),
    *("--lr-decay-style", "cosine", "--lr-decay-iters", "20", "--min-lr", "1e-3"),
)
# The last rank of pp2 and the first of a frozen start train nothing of what the other trains.
FREEZE = ("--freeze", "images", "language.embedding", "language.decoder.layers.0")


def continued(
    ranks: RankPool, output: Path, layouts: dict[str, int], *flags: str
) -> dict[int, float]:
    """Losses of a run that goes from layout to layout."""
    for layout, last in layouts.items():
        succeed(ranks, output, layout, *COMPARABLE, *flags, "--train-iters", str(last))
    return {number: float(loss) for number, loss in losses(output).items()}


@pytest.fixture(scope="module")
def base(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a short run that trains everything."""
    output = tmp_path_factory.mktemp("base")
    succeed(ranks, output, "one", *COMPARABLE, "--train-iters", "2")
    return output / "checkpoints"


@pytest.mark.parametrize(
    ("layouts", "optimizer"),
    [
        ({"tp2-cp2": 2, "one": 3, "pp2": 4}, ()),
        pytest.param(
            {"dp2": 2, "tp2": 4}, ("--use-distributed-optimizer",), marks=pytest.mark.wide
        ),
    ],
    ids=["tp-cp-pp", "zero"],
)
def test_adapters_move_from_layout_to_layout(
    ranks: RankPool,
    base: Path,
    tmp_path: Path,
    layouts: dict[str, int],
    optimizer: tuple[str, ...],
) -> None:
    """Begun from a checkpoint without adapters; the same command goes on from the run's own."""
    longer = ("--seq-length", "16", "--max-position-embeddings", "16")
    flags = (*LORA, *longer, *optimizer, "--load", str(base))
    last = max(layouts.values())
    expected = continued(ranks, tmp_path / "one", {"one": last}, *flags)
    found = continued(ranks, tmp_path / "moved", layouts, *flags)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[last] < expected[1]


@pytest.mark.parametrize(
    ("flags", "optimizer"),
    [
        (RATES, ()),
        pytest.param(FREEZE, (), marks=pytest.mark.wide),
        (FREEZE, ("--use-distributed-optimizer",)),
    ],
    ids=["rates", "freeze", "freeze-zero"],
)
def test_rates_and_frozen_parts_in_every_layout(
    ranks: RankPool, base: Path, tmp_path: Path, flags: tuple[str, ...], optimizer: tuple[str, ...]
) -> None:
    flags = (*flags, *optimizer, "--finetune", "--load", str(base))
    expected = continued(ranks, tmp_path / "one", {"one": 5}, *flags)
    moved = {"dp2": 5} if optimizer else {"tp2": 2, "pp2": 5}
    assert continued(ranks, tmp_path / "moved", moved, *flags) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "has adapters: --lora language --lora-rank 4 --lora-alpha 32"),
        ((*LORA[:3], "8"), "--lora-rank is 8 and the adapters in"),
        ((*LORA, "--lr", "1e-3"), "--lr is 0.001 and the optimizer in"),
        ((*LORA, "--module-lr", "language=1e-4"), "--module-lr is language=0.0001 and"),
    ],
)
def test_a_run_goes_on_with_what_it_began(
    ranks: RankPool, lora_run: Path, flags: tuple[str, ...], message: str
) -> None:
    (exit_,) = train(ranks, lora_run, "one", *COMPARABLE, *flags, "--train-iters", "9")
    assert exit_.exit_code == 2
    assert message in exit_.stderr


@pytest.fixture(scope="module")
def lora_run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora")
    printed = succeed(ranks, output, "one", *COMPARABLE, *LORA, "--train-iters", "1")
    assert "trains 0.0022 of 0.0095 million parameters" in printed
    return output


def test_a_run_without_adapters_gets_none_later(
    ranks: RankPool, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "checkpoints")
    (exit_,) = train(ranks, tmp_path, "one", *COMPARABLE, *LORA, "--train-iters", "9")
    assert exit_.exit_code == 2
    assert "has no adapters; start another one from it: --load" in exit_.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--freeze", "language.decoder.layer"), "did you mean 'language.decoder.layers"),
        (("--module-lr", "image.encoders=1e-3"), "did you mean 'images.encoders'"),
        (("--module-lr", "images=1e-3", "--freeze", "images"), "all of it is frozen"),
        (("--lora", "images"), "--lora images: it has no layer called linear_qkv"),
        (("--lora", "language", "--lora-targets", "qkv"), "it has no layer called qkv"),
        (("--freeze", "language", "images"), "nothing is trained"),
    ],
)
def test_names_that_no_rank_has(
    ranks: RankPool, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    run = start(ranks, tmp_path, "pp2", "--no-output", *flags)
    printed = "".join(exit_.stderr for exit_ in run.wait())
    assert message in printed, printed
