"""Cells whose modules have grids of their own equal one process.

``python -m tests.matrix --grids`` runs all of them.
"""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.matrix.asked import asked_verdicts
from tests.matrix.cells import make_cell, name_of, ranks_of
from tests.matrix.grid_cells import (
    FEATURES,
    GRIDS,
    feature_pairs,
    grid_cells,
    small_grid_cells,
)
from tests.matrix.runner import Verdict
from tests.rank_pool import RankPool
from tests.tiers import some

SMALL = {name_of(values): values for values in small_grid_cells()}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, Verdict]:
    return asked_verdicts(request, ranks, SMALL, test_cell)


@pytest.mark.parametrize("name", some(SMALL, *list(SMALL)[::6]))
def test_cell(verdicts: dict[str, Verdict], name: str) -> None:
    assert not verdicts[name].failure, verdicts[name].failure


def test_the_set_is_what_it_says() -> None:
    cells = grid_cells()
    assert len({name_of(values) for values in cells}) == len(cells) == GRIDS >= 120
    assert {ranks_of(values) for values in cells} == {*range(2, 9)}
    for values in cells[:: len(cells) // 20]:
        assert make_cell(values)[0].world_size == ranks_of(values)
    for axis in ("images_tp", "sounds_tp", "activations"):
        assert len({values[axis] for values in cells}) > 1, axis
    met = set().union(*map(feature_pairs, cells))
    all_pairs = {(apart, *pair) for apart in (True, False) for pair in combinations(FEATURES, 2)}
    # As many replicas of both kinds, and two of the language model, are more than eight ranks.
    assert all_pairs - met == {(True, "fan-in", "uneven")}
