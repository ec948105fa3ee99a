"""Levels of image rows equal one process: some of the cells, all of which ``make matrix`` runs."""

from __future__ import annotations

import pytest

from tests.matrix.asked import asked_verdicts
from tests.matrix.cells import is_valid, name_of
from tests.matrix.deepstack_cells import deepstack_cells
from tests.matrix.runner import Verdict
from tests.rank_pool import RankPool
from tests.tiers import some

CELLS = {name_of(values): values for values in deepstack_cells()}
KEPT = (  # of one kind each
    "tp2-sp-cp2-mrope-packed-layers:deepstack",
    "pp2-no-media-layers:deepstack",
    "pp2-vpp2-dp2-distributed-overlap-layers:deepstack",
    "cp2-pp2-vpp2-alltoall-ep2-packed-layers:deepstack",
)


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, Verdict]:
    return asked_verdicts(request, ranks, CELLS, test_cell)


def test_all_cells_are_valid() -> None:
    assert len(CELLS) == 21
    assert all(map(is_valid, CELLS.values()))


@pytest.mark.parametrize("name", some(CELLS, *KEPT))
def test_cell(verdicts: dict[str, Verdict], name: str) -> None:
    assert not verdicts[name].failure, verdicts[name].failure
