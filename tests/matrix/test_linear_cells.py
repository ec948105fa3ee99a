"""Cells with linear layers equal one process; ``make matrix ARGS="--linear"`` runs all of them."""

from __future__ import annotations

import pytest

from tests.matrix.asked import asked_verdicts
from tests.matrix.cells import is_valid, make_cell, name_of
from tests.matrix.linear_cells import LINEAR, linear_cells, small_linear_cells
from tests.matrix.runner import Verdict
from tests.rank_pool import RankPool
from tests.tiers import some

SMALL = {name_of(values): values for values in small_linear_cells()}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, Verdict]:
    return asked_verdicts(request, ranks, SMALL, test_cell)


@pytest.mark.parametrize("name", some(SMALL, *list(SMALL)[:2]))
def test_cell(verdicts: dict[str, Verdict], name: str) -> None:
    assert not verdicts[name].failure, verdicts[name].failure


def test_the_set_is_what_it_says() -> None:
    cells = linear_cells()
    assert len({name_of(values) for values in cells}) == len(cells) == LINEAR >= 60
    assert all(map(is_valid, cells))
    assert all(make_cell(values)[1].linear for values in cells)
    for axis in ("tp", "sp", "cp", "pp", "vpp", "dp", "ep", "packing", "recompute", "precision"):
        assert len({values[axis] for values in cells}) > 1, axis
