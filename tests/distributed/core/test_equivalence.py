"""Every layout gives the loss, gradients and trained weights of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.distributed.core.layouts import (
    Deviation,
    Layout,
    Outcome,
    Tensors,
    run_gradients,
    run_reference,
    run_training,
)
from tests.distributed.core.reference import Design
from tests.rank_pool import RankPool
from tests.tiers import some

TOLERANCE = 1e-5  # fp32: of the norm of each parameter's gradient, and of the loss

UNTIED = Design()
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "dp2-overlap": Layout(dp=2, overlap_grad_reduce=True),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp2-sp-pp2": Layout(tp=2, pp=2, sequence_parallel=True),
    "tp2-dp2": Layout(tp=2, dp=2),
    "tp2-sp-dp2-overlap": Layout(tp=2, dp=2, sequence_parallel=True, overlap_grad_reduce=True),
    "pp2-dp2-overlap": Layout(pp=2, dp=2, overlap_grad_reduce=True),
}
DESIGNS = {
    "tied": Design(tied=True),
    "learned-positions": Design(learned_positions=True),
    "frozen-encoders": Design(frozen=("images.encoders", "sounds.encoders")),
    "frozen-language": Design(frozen=("language",)),
    "projection-only": Design(frozen=("language", "images.encoders", "sounds")),
    "frozen-first-stage": Design(frozen_start=True),
}
# Every layout with the plain model, and each other design where it meets something of its own.
_GRADIENTS = [
    *((layout, "untied") for layout in LAYOUTS),
    ("tp2-sp", "tied"),
    ("tp2-pp2", "tied"),
    ("pp2-dp2-overlap", "tied"),
    ("dp2", "learned-positions"),
    ("tp2-sp-pp2", "learned-positions"),
    ("pp2", "frozen-encoders"),
    ("tp2-sp-dp2-overlap", "frozen-encoders"),
    ("pp2-dp2-overlap", "frozen-language"),
    ("tp2-sp-pp2", "projection-only"),
    ("dp2-overlap", "projection-only"),
    ("pp2-dp2-overlap", "frozen-first-stage"),
    ("tp2-sp-pp2", "frozen-first-stage"),
]
GRADIENTS = {"-".join(one): one for one in _GRADIENTS}
DISTRIBUTED = {
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
TRAINED = {
    "dp2": (Layout(dp=2), UNTIED),
    "dp2-overlap": (Layout(dp=2, overlap_grad_reduce=True), UNTIED),
    "dp2-distributed": (Layout(dp=2, distributed_optimizer=True), UNTIED),
    "dp2-distributed-overlap": (Layout(dp=2, **DISTRIBUTED), UNTIED),
    "tp2-sp": (Layout(tp=2, sequence_parallel=True), UNTIED),
    "tp2-pp2-tied": (Layout(tp=2, pp=2), DESIGNS["tied"]),
    "tp2-dp2-distributed-overlap": (Layout(tp=2, dp=2, **DISTRIBUTED), UNTIED),
    "pp2-dp2-distributed-overlap": (Layout(pp=2, dp=2, **DISTRIBUTED), UNTIED),
    "pp2-frozen-language": (Layout(pp=2), DESIGNS["frozen-language"]),
    "pp2-dp2-distributed-projection-only": (
        Layout(pp=2, dp=2, **DISTRIBUTED),
        DESIGNS["projection-only"],
    ),
    "pp2-dp2-distributed-frozen-first-stage": (
        Layout(pp=2, dp=2, **DISTRIBUTED),
        DESIGNS["frozen-first-stage"],
    ),
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Callable[[Design], Outcome]:
    known: dict[Design, Outcome] = {}

    def outcome(design: Design) -> Outcome:
        if design not in known:
            (known[design],) = ranks(1)(run_reference, design)
        return known[design]

    return outcome


def check(
    layout: Layout, deviations: Sequence[Deviation], losses: list[float], whole: Tensors
) -> None:
    """Losses and tensors agree on each rank; together the ranks compared all of every tensor."""
    for rank, deviation in enumerate(deviations):
        wrong = {name: error for name, error in deviation.errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank} of {layout}: relative errors {wrong}"
        assert deviation.losses == pytest.approx(losses, rel=TOLERANCE)
    for key, tensor in whole.items():
        spans = set().union(*(deviation.covered.get(key, set()) for deviation in deviations))
        assert sum(span[-1] for span in spans) == tensor.numel(), key


@pytest.mark.parametrize(
    "name",
    some(
        GRADIENTS,
        "tp2-pp2-untied",
        "tp2-sp-pp2-learned-positions",
        "tp2-sp-dp2-overlap-frozen-encoders",
        "pp2-dp2-overlap-frozen-language",
        "dp2-overlap-projection-only",
        "pp2-dp2-overlap-frozen-first-stage",
    ),
)
def test_gradients(ranks: RankPool, reference: Callable[[Design], Outcome], name: str) -> None:
    layout_name, design_name = GRADIENTS[name]
    layout, design = LAYOUTS[layout_name], DESIGNS.get(design_name, UNTIED)
    expected = reference(design)
    deviations = ranks(layout.world_size)(run_gradients, layout, design, expected)
    check(layout, deviations, expected.losses, expected.gradients[0])


@pytest.mark.parametrize(
    "name",
    some(
        TRAINED,
        "tp2-pp2-tied",
        "tp2-dp2-distributed-overlap",
        "pp2-dp2-distributed-frozen-first-stage",
    ),
)
def test_training(ranks: RankPool, reference: Callable[[Design], Outcome], name: str) -> None:
    layout, design = TRAINED[name]
    expected = reference(design)
    deviations = ranks(layout.world_size)(run_training, layout, design, expected)
    for deviation in deviations:
        assert deviation.norms == pytest.approx(expected.norms, rel=TOLERANCE)
    check(layout, deviations, expected.trained_losses, expected.trained)
