"""Cells whose modules have grids of their own: on the same ranks, and on ranks of their own.

The first are those of the matrix, with the encoders' sizes drawn: encoders run on all ranks of the
language model, before it does. The others are drawn so that all features of ``FEATURES`` meet, two
by two, in modules that share their ranks and in modules that do not.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations, product
from typing import Any

from tests.matrix.cells import AXES, Values, all_cells, cover, draw, ranks_of

_OF_THE_MATRIX = 150
GRIDS = 220
_SMALL = 14
_WEIGHT = 10
FEATURES = (
    "fan-in",
    "fan-out",
    "uneven",
    "pp",
    "cp",
    "vpp",
    "packed",
    "mrope",
    "frozen",
    "no media",
    "two encoders",
    "distributed optimizer",
    "overlap",
    "bf16",
)
_APART = AXES | {"cp": (1, 2), "pp": (1, 2, 3, 4), "dp": (1, 2, 3, 4)}
_BOTH_KINDS = AXES | {"pp": (1, 2, 3, 4), "dp": (1, 2, 3, 4)}


def is_apart(values: Values) -> bool:
    """Its encoders have ranks that the language model has not."""
    return values.get("encoders", "language") != "language"


def grid_features(values: Values) -> list[str]:
    """Those of ``FEATURES`` that a cell has.

    Fan-in: an encoder has more replicas than the language model, fan-out: fewer, uneven: neither
    number divides the other. Two encoders: each with a layout of its own.
    """
    replicas = _encoder_replicas(values)
    dp = values["dp"]
    has = {
        "fan-in": any(one > dp and one % dp == 0 for one in replicas),
        "fan-out": any(one < dp and dp % one == 0 for one in replicas),
        "uneven": any(one % dp and dp % one for one in replicas),
        "pp": values["pp"] > 1,
        "cp": values["cp"] > 1,
        "vpp": values["vpp"] is not None,
        "packed": values["packing"] == "packed",
        "mrope": values["positions"] == "mrope",
        "frozen": values["frozen"] != "nothing",
        "no media": values["media"] == "none",
        "two encoders": values.get("encoders") == "apart"
        or values["images_tp"] != values["sounds_tp"],
        "distributed optimizer": values["reduction"].startswith("distributed"),
        "overlap": values["reduction"].endswith("overlap"),
        "bf16": values["precision"] == "bf16",
    }
    return [name for name in FEATURES if has[name]]


def feature_pairs(values: Values) -> set[tuple[Any, ...]]:
    """Pairs of features that meet in it, and whether modules are apart there."""
    return {(is_apart(values), *pair) for pair in combinations(grid_features(values), 2)}


def _encoder_replicas(values: Values) -> tuple[int, int]:
    if is_apart(values):
        return values["images_dp"], values["sounds_dp"]
    ranks = ranks_of(values)
    return ranks // values["images_tp"], ranks // values["sounds_tp"]


def _with_encoders(values: Values, generator: random.Random) -> Values:
    """On the language model's ranks."""
    ranks = ranks_of(values)
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return values | {
        # Its four heads are cut, and what knows nothing of Megatron takes any size.
        "images_tp": generator.choice([size for size in sizes if size in (1, 2, 4)]),
        "sounds_tp": generator.choice(sizes),
        "activations": generator.choice(["keep", "recompute"]),
    }


def _drawn(generator: random.Random) -> Values:
    """A cell whose encoders are apart, or some of those that the matrix has not."""
    while True:
        if generator.random() < 0.2:
            values = draw(_BOTH_KINDS, generator)
            if 3 in (values["dp"], values["pp"]):
                return _with_encoders(values, generator)
            continue
        values = draw(_APART, generator)
        encoders = {
            "images_tp": generator.choice([1, 2, 4]),
            "sounds_tp": generator.choice([1, 2, 3]),
            "images_dp": generator.choice([1, 2, 3, 4]),
            "sounds_dp": generator.choice([1, 2, 3, 4]),
            "encoders": generator.choice(["apart", "apart", "together"]),
            "activations": generator.choice(["keep", "recompute"]),
        }
        together = encoders["encoders"] == "together"
        images, sounds = (
            encoders[f"{name}_tp"] * encoders[f"{name}_dp"] for name in ("images", "sounds")
        )
        values |= encoders
        if ranks_of(values) <= 8 and (images == sounds or not together):
            return values


@cache
def _grid_cells() -> tuple[Values, ...]:
    generator = random.Random(27)
    found = [_with_encoders(values, generator) for values in all_cells() if ranks_of(values) > 1][
        :_OF_THE_MATRIX
    ]
    return tuple(cover(_drawn, _Met(), first=found, limit=GRIDS))


class _Met:
    """Pairs of features, of more weight than the pairs of values of a cell that is apart."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def add(self, cell: Values) -> None:
        """Take note of a cell's pairs."""
        self._seen |= self._pairs(cell)

    def missing(self, cell: Values) -> int:
        """How many of a cell's pairs are new, each with its weight."""
        return len(self._pairs(cell) - self._seen)

    def _pairs(self, cell: Values) -> set[Any]:
        found: set[Any] = set(product(feature_pairs(cell), range(_WEIGHT)))
        items = [item for item in cell.items() if item[0] != "layers"]
        return found | set(combinations(items, 2)) if is_apart(cell) else found


def grid_cells() -> list[Values]:
    """``GRIDS`` cells of 2 to 8 ranks, the same on every machine."""
    return list(_grid_cells())


def small_grid_cells() -> list[Values]:
    """Some of them with at most four ranks, those with modules apart first."""
    small = [v for v in _grid_cells() if ranks_of(v) <= 4]
    shared = [v for v in small if not is_apart(v)]
    return [*filter(is_apart, small), *shared[:: max(1, len(shared) // _SMALL)]]
