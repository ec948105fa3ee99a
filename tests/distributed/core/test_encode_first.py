"""Encoders on every rank before the language model's schedule equal one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.core.grids import GridLayout, run_gradients, run_training
from tests.distributed.core.layouts import Deviation, Outcome, run_reference
from tests.distributed.core.reference import Design
from tests.rank_pool import RankPool
from tests.tiers import some

TOLERANCE = 1e-5  # of the norm of each parameter's gradient, and of the loss

CELLS = {
    "one rank": (GridLayout(), Design()),
    "tp2": (GridLayout(tp=2), Design()),
    "pp2": (GridLayout(pp=2), Design()),
    "cp2": (GridLayout(cp=2), Design()),
    "dp2": (GridLayout(dp=2), Design()),
    "dp2-images tp2": (GridLayout(dp=2, images_tp=2), Design()),
    "pp2-images tp2": (GridLayout(pp=2, images_tp=2), Design()),
    "tp2-sp-cp2": (GridLayout(tp=2, cp=2, sequence_parallel=True), Design()),
    "pp2-vpp2-overlap": (
        GridLayout(pp=2, vpp=2, overlap_grad_reduce=True),
        Design(layers=4),
    ),
    "tp2-pp2-dp2": (GridLayout(tp=2, pp=2, dp=2, images_tp=2), Design()),
    "sounds tp4 over two replicas": (GridLayout(tp=2, dp=2, sounds_tp=4), Design()),
    "recompute": (GridLayout(cp=2, activations="recompute"), Design()),
    "frozen encoders": (GridLayout(pp=2), Design(frozen=("images", "sounds"))),
    "frozen language": (GridLayout(pp=2, dp=2), Design(frozen=("language",))),
    "only projections": (
        GridLayout(tp=2, dp=2, overlap_grad_reduce=True),
        Design(frozen=("images.encoders", "language")),
    ),
    "no media": (GridLayout(pp=2), Design(media=False)),
    # One of two ranks between which experts are divided has no media in a step.
    "apart, ep2, frozen language": (
        GridLayout(dp=2, ep=2, encoders="together"),
        Design(experts=4, frozen=("language",)),
    ),
    "packed-cp2": (GridLayout(cp=2, packed=True), Design()),
    "mrope-pp2": (GridLayout(pp=2), Design(mrope=True)),
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Callable[[Design], Outcome]:
    known: dict[Design, Outcome] = {}

    def outcome(design: Design) -> Outcome:
        if design not in known:
            (known[design],) = ranks(1)(run_reference, design)
        return known[design]

    return outcome


@pytest.mark.parametrize(
    "name",
    some(
        CELLS,
        "one rank",
        "pp2-images tp2",
        "pp2-vpp2-overlap",
        "sounds tp4 over two replicas",
        "frozen language",
        "apart, ep2, frozen language",
        "packed-cp2",
    ),
)
def test_loss_and_gradients(
    ranks: RankPool, reference: Callable[[Design], Outcome], name: str
) -> None:
    layout, design = CELLS[name]
    expected = reference(design)
    found = ranks(layout.world_size)(run_gradients, layout, design, expected)
    for deviation in found:
        assert deviation.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        wrong = {key: one for key, one in deviation.errors.items() if not one < TOLERANCE}
        assert not wrong
    check_covered(found, expected)


def check_covered(found: list[Deviation], expected: Outcome) -> None:
    keys = {key for deviation in found for key in deviation.covered}
    assert keys >= set(expected.gradients[0])


TRAINED = {
    "tp2-pp2-dp2": CELLS["tp2-pp2-dp2"],
    "pp2-vpp2-overlap": CELLS["pp2-vpp2-overlap"],
    "tp2-sp-distributed-overlap": (
        GridLayout(
            tp=2,
            dp=2,
            sequence_parallel=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            distributed_optimizer=True,
        ),
        Design(tied=True),
    ),
    "pp2-dp2-distributed": (
        GridLayout(pp=2, dp=2, images_tp=2, distributed_optimizer=True),
        Design(),
    ),
    "pp2-frozen encoders": CELLS["frozen encoders"],
}


@pytest.mark.parametrize("name", some(TRAINED, "tp2-sp-distributed-overlap", "pp2-frozen encoders"))
def test_training(ranks: RankPool, reference: Callable[[Design], Outcome], name: str) -> None:
    layout, design = TRAINED[name]
    expected = reference(design)
    for deviation in ranks(layout.world_size)(run_training, layout, design, expected):
        assert deviation.norms == pytest.approx(expected.norms, rel=TOLERANCE)
        assert max(deviation.errors.values()) < TOLERANCE
