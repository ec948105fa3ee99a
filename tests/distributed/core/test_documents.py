"""Packing, multimodal RoPE, spans and several encoders give what each document gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.core.documents import (
    Definition,
    Deviation,
    Kind,
    Sizes,
    run_definition,
    run_layout,
)
from tests.rank_pool import RankPool
from tests.tiers import some

TOLERANCE = 1e-5  # fp32 against float64: of the norm of each parameter's gradient, and of the loss

LAYOUTS = {
    "one": Sizes(),
    "cp2": Sizes(cp=2),
    "tp2": Sizes(tp=2),
    "pp2": Sizes(pp=2),
    "tp2-cp2": Sizes(tp=2, cp=2),
    "pp2-cp2": Sizes(pp=2, cp=2),
    "cp4": Sizes(cp=4),
}
KINDS = {
    "packed": Kind(),
    "packed-learned": Kind(positions="learned_absolute"),
    "packed-mrope": Kind(positions="mrope"),
    "packed-spans": Kind(spans=True),
    "packed-mrope-spans": Kind(positions="mrope", spans=True),
    "dense": Kind(packed=False),
    "dense-mrope": Kind(positions="mrope", packed=False),
    "dense-spans": Kind(spans=True, packed=False),
    "dense-mrope-spans": Kind(positions="mrope", spans=True, packed=False),
}
_CELLS = [
    *(("packed", layout) for layout in LAYOUTS),
    ("packed-learned", "cp2"),
    ("packed-learned", "tp2-cp2"),
    *(("packed-mrope", layout) for layout in ("one", "cp2", "tp2-cp2", "pp2-cp2")),
    *(("packed-spans", layout) for layout in ("one", "cp2", "pp2")),
    *(("packed-mrope-spans", layout) for layout in ("tp2-cp2", "pp2-cp2", "cp4")),
    ("dense", "cp2"),
    *(("dense-mrope", layout) for layout in ("cp2", "tp2-cp2", "pp2")),
    *(("dense-spans", layout) for layout in ("one", "cp2")),
    *(("dense-mrope-spans", layout) for layout in ("tp2-cp2", "pp2-cp2")),
]
CELLS = {"-".join(one): one for one in _CELLS}


@pytest.fixture(scope="module")
def definition(ranks: RankPool) -> Callable[[Kind], Definition]:
    known: dict[tuple[str, bool], Definition] = {}

    def of(kind: Kind) -> Definition:
        key = kind.positions, kind.spans
        if key not in known:
            (known[key],) = ranks(1)(run_definition, kind)
        return known[key]

    return of


@pytest.mark.parametrize(
    "name",
    some(
        CELLS,
        "packed-one",
        "packed-tp2-cp2",
        "packed-learned-cp2",
        "packed-mrope-tp2-cp2",
        "packed-spans-pp2",
        "packed-mrope-spans-pp2-cp2",
        "packed-mrope-spans-cp4",
        "dense-cp2",
        "dense-mrope-pp2",
        "dense-mrope-spans-tp2-cp2",
    ),
)
def test_loss_and_gradients(
    ranks: RankPool, definition: Callable[[Kind], Definition], name: str
) -> None:
    kind_name, layout_name = CELLS[name]
    kind, sizes = KINDS[kind_name], LAYOUTS[layout_name]
    truth = definition(kind)
    deviations: list[Deviation] = ranks(sizes.world_size)(run_layout, kind, sizes, truth)
    for rank, deviation in enumerate(deviations):
        wrong = {name: error for name, error in deviation.errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: relative errors {wrong}"
        assert deviation.loss == pytest.approx(truth.loss, rel=TOLERANCE)
    for key, gradient in truth.gradients.items():
        assert gradient.any(), f"{key} has no gradient to compare"
        spans = {deviation.covered[key] for deviation in deviations if key in deviation.covered}
        assert sum(span[-1] for span in spans) == gradient.numel(), key


def test_what_is_varied_matters(ranks: RankPool, definition: Callable[[Kind], Definition]) -> None:
    losses = [
        definition(Kind(positions=positions, spans=spans)).loss
        for positions in ("rope", "mrope")
        for spans in (False, True)
    ]
    apart = [abs(a - b) for i, a in enumerate(losses) for b in losses[:i]]
    assert min(apart) > 10 * TOLERANCE * losses[0]
