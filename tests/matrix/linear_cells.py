"""Cells whose language model has linear layers: those of the matrix that go with them.

Every other layer, the first of each stage of one among them, has a gated delta net in place of
attention. It is causal, so that no image's tokens see each other, and its four key heads are cut by
tensor and context parallelism together.
"""

from __future__ import annotations

from functools import cache

from tests.matrix.cells import Values, all_cells

__all__ = ["LINEAR", "linear_cells", "small_linear_cells"]

LINEAR = 72
_KEY_HEADS = 4
# Of those that make test runs: what each has that the others have not.
_SMALL = (
    {"tp": 2, "cp": 1, "sp": True, "pp": 1},
    {"tp": 1, "cp": 2, "packing": "packed", "experts": "none"},
    {"pp": 2, "recompute": "uniform", "tp": 1},
    {"vpp": 2, "tp": 1, "cp": 1},
    {"stages": "uneven", "tp": 1},
    {"ep": 2, "precision": "fp32"},
    {"precision": "bf16", "tp": 2},
)


@cache
def _linear_cells() -> tuple[Values, ...]:
    able = [
        values | {"layers": "linear"}
        for values in all_cells()
        if values["layers"] == "plain"
        and values["attention"] == "causal"
        and values["tp"] * values["cp"] <= _KEY_HEADS
    ]
    return tuple(able[:LINEAR])


def linear_cells() -> list[Values]:
    """``LINEAR`` cells, the same on every machine."""
    return list(_linear_cells())


def small_linear_cells() -> list[Values]:
    """The smallest cell that has each of ``_SMALL``."""

    def ranks(values: Values) -> int:
        size: int = values["tp"] * values["cp"] * values["pp"] * values["dp"]
        return size

    found = []
    for wanted in _SMALL:
        having = [v for v in _linear_cells() if wanted.items() <= v.items() and v not in found]
        found.append(min(having, key=ranks))
    return found
