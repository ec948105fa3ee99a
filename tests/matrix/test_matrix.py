"""Cells that cover every value, and with ``--wide`` every pair of values, equal one process.

``make matrix`` runs many more.
"""

from __future__ import annotations

from itertools import combinations

import pytest

from tests.matrix.asked import asked_verdicts
from tests.matrix.cells import (
    AXES,
    FULL_SIZE,
    Values,
    all_cells,
    is_valid,
    name_of,
    pair_cells,
    value_cells,
)
from tests.matrix.runner import Verdict
from tests.rank_pool import RankPool
from tests.tiers import some

PAIRS = {name_of(values): values for values in pair_cells()}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, Verdict]:
    return asked_verdicts(request, ranks, PAIRS, test_cell)


@pytest.mark.parametrize("name", some(PAIRS, *map(name_of, value_cells())))
def test_cell(verdicts: dict[str, Verdict], name: str) -> None:
    assert not verdicts[name].failure, verdicts[name].failure


def test_sets_are_what_they_say() -> None:
    everything = all_cells()
    names = [name_of(values) for values in everything]
    assert len(set(names)) == len(names) == FULL_SIZE >= 300
    assert names[: len(PAIRS)] == list(PAIRS)
    assert all(map(is_valid, everything))
    seen = {pair for values in everything for pair in combinations(values.items(), 2)}
    for axis, choices in AXES.items():
        for value in choices:
            assert any((axis, value) in pair for pair in seen), (axis, value)


def test_a_wrong_gradient_fails(ranks: RankPool) -> None:
    """The comparison can say no: a cell is held against another design's one process."""
    from tests.matrix.cells import make_cell
    from tests.matrix.ranks import run_cells, run_references
    from tests.matrix.runner import FP32, deviations

    first: Values = {axis: choices[0] for axis, choices in AXES.items()}
    layout, design = make_cell(first)
    ((expected,),) = ranks(1)(run_references, [design])
    seen = [of_rank[0] for of_rank in ranks(1)(run_cells, [(layout, design, expected)])]
    assert not list(deviations(seen, expected, FP32))
    for tensors in (expected.trained, expected.gradients):
        key = next(iter(tensors))
        right = tensors[key].clone()
        tensors[key] += 1e-4 * right.norm() / right.numel() ** 0.5
        seen = [of_rank[0] for of_rank in ranks(1)(run_cells, [(layout, design, expected)])]
        assert list(deviations(seen, expected, FP32))
        tensors[key] = right
