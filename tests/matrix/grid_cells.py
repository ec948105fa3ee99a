"""Cells whose modules have grids of their own: those of the matrix, with the encoders' sizes drawn.

The language model's layout is the cell's; its encoders run on all of its ranks, before it does.
"""

from __future__ import annotations

import random
from functools import cache

from tests.matrix.cells import Values, all_cells

GRIDS = 150
_SMALL = 14


@cache
def _grid_cells() -> tuple[Values, ...]:
    generator = random.Random(27)
    cells = []
    for values in all_cells():
        ranks = values["tp"] * values["cp"] * values["pp"] * values["dp"]
        if ranks == 1:
            continue
        sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
        drawn = generator.choice([size for size in sizes if size <= 4])
        cells.append(
            values
            | {
                # Its four heads are cut, and what knows nothing of Megatron takes any size. In bf16
                # partial sums would be rounded apart from those of one process, by more than norms
                # are compared to where little else is trained.
                "images_tp": 1 if values["precision"] == "bf16" else drawn,
                "sounds_tp": generator.choice(sizes),
                "activations": generator.choice(["keep", "recompute"]),
            }
        )
    return tuple(cells[:GRIDS])


def grid_cells() -> list[Values]:
    """``GRIDS`` cells of 2 to 8 ranks, the same on every machine."""
    return list(_grid_cells())


def small_grid_cells() -> list[Values]:
    """Some of them with at most four ranks, of every kind of reduction and packing."""
    small = [v for v in _grid_cells() if v["tp"] * v["cp"] * v["pp"] * v["dp"] <= 4]
    return small[:: max(1, len(small) // _SMALL)]
