"""Levels of image rows equal one process, whatever pipeline stages their layers are on."""

from __future__ import annotations

import pytest

from tests.matrix.asked import asked_verdicts
from tests.matrix.cells import AXES, Values, is_valid, name_of
from tests.matrix.runner import Verdict
from tests.rank_pool import RankPool
from tests.tiers import some

CELLS: tuple[Values, ...] = tuple(
    {axis: values[0] for axis, values in AXES.items()} | {"layers": "deepstack", **changes}
    for changes in (
        {"tp": 2, "sp": True, "cp": 2, "positions": "mrope", "packing": "packed"},
        {"pp": 2, "media": "none"},
        {"pp": 4, "stages": "embedding-alone", "embeddings": "tied"},
        {"pp": 2, "vpp": 2, "dp": 2, "reduction": "distributed-overlap"},
        {"pp": 4, "tp": 2, "sp": True, "recompute": "projections", "stages": "uneven"},
        {"pp": 2, "frozen": "first-half", "vpp": 2},
        {"experts": "alltoall", "ep": 2, "cp": 2, "pp": 2, "vpp": 2, "packing": "packed"},
        # more of these kinds
        {},
        {"tp": 2, "sp": True},
        {"cp": 2, "packing": "packed"},
        {"pp": 2},
        {"pp": 4, "recompute": "uniform", "positions": "mrope"},
        {"pp": 2, "vpp": 2, "stages": "uneven", "recompute": "block"},
        {"pp": 2, "vpp": 2, "tp": 2, "sp": True, "packing": "packed", "micro_batch": 1},
        {"pp": 2, "cp": 2, "dp": 2, "reduction": "overlap", "attention": "spans"},
        {"pp": 2, "frozen": "encoders"},
        {"pp": 2, "frozen": "language", "recompute": "uniform"},
        {"pp": 2, "frozen": "all-but-projection", "dp": 2, "reduction": "overlap"},
        {"pp": 2, "precision": "bf16", "vpp": 2},
        {"experts": "alltoall", "ep": 2, "dp": 2, "recompute": "uniform"},
        {"experts": "allgather", "ep": 2, "pp": 2, "vpp": 2, "dp": 2, "recompute": "moe"},
    )
)
KEPT = 7  # of one kind each
NAMED = {name_of(values): values for values in CELLS}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, ranks: RankPool) -> dict[str, Verdict]:
    return asked_verdicts(request, ranks, NAMED, test_cell)


@pytest.mark.parametrize("name", some(NAMED, *map(name_of, CELLS[:KEPT])))
def test_cell(verdicts: dict[str, Verdict], name: str) -> None:
    assert is_valid(NAMED[name])
    assert not verdicts[name].failure, verdicts[name].failure
