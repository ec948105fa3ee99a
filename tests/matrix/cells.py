"""The cells of the equivalence matrix: which there are, and which of them are run.

A cell is one value on each axis. All valid cells are some hundred thousand; a set of them is drawn
that covers every valid pair of values (``PAIRS``, a small set) and, beyond it, as many triples as
its size allows (``all_cells``). Both are the same on every machine.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache, partial
from itertools import accumulate, combinations
from typing import Any, Protocol

import numpy as np

from tests.distributed.core.grids import GridLayout
from tests.distributed.core.layouts import Layout
from tests.distributed.core.recompute import RECOMPUTED
from tests.distributed.core.reference import MEDIA, Design

Cell = tuple[Layout, Design]
Values = dict[str, Any]

MAX_RANKS = 8
_DRAWN = 312
_CANDIDATES = 24  # drawn for each cell that is chosen
_DRY = 60
_EXPERTS = 4

_BOTH = {
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
REDUCTIONS: dict[str, Values] = {
    "plain": {},
    "overlap": {"overlap_grad_reduce": True},
    "distributed": {"distributed_optimizer": True},
    "distributed-overlap": _BOTH,
}
FROZEN: dict[str, Values] = {
    "nothing": {},
    "encoders": {"frozen": ("images.encoders", "sounds.encoders")},
    "language": {"frozen": ("language",)},
    "all-but-projection": {"frozen": ("language", "images.encoders", "sounds")},
    "first-half": {"frozen_start": True},
}

# Of cells whose modules have grids of their own.
ENCODER_AXES = ("images_tp", "sounds_tp", "images_dp", "sounds_dp", "encoders", "activations")
# Kinds of layers that only the listed cells have.
LAYERS: dict[str, Values] = {
    "plain": {},
    "no-biases": {"biases": False},
    "shared-experts": {"shared_experts": True},
    "latent": {"latent": True},
    "deepstack": {"levels": 3},
    "linear": {"linear": True},
}
_IN_OTHER_LISTS = ("deepstack", "linear")  # of deepstack_cells and linear_cells alone
# Of ``RECOMPUTED``, what is listed and not drawn.
LISTED = tuple(name for name in RECOMPUTED if name != "selective")
AXES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "sp": (False, True),
    "cp": (1, 2, 4),
    "pp": (1, 2, 4),
    "vpp": (None, 2),
    "stages": ("even", "uneven", "embedding-alone"),
    "dp": (1, 2, 4),
    "experts": ("none", "allgather", "alltoall"),
    "ep": (1, 2, 4),
    "etp": (None, 1),
    "reduction": tuple(REDUCTIONS),
    "recompute": ("", "selective", "uniform", "block", "projections", *LISTED),
    "positions": ("rope", "learned", "mrope"),
    "packing": ("no", "packed"),
    "attention": ("causal", "spans"),
    "embeddings": ("untied", "tied"),
    "precision": ("fp32", "bf16"),
    "frozen": tuple(FROZEN),
    "media": ("some", "none"),
    "micro_batch": (2, 1),
    "layers": tuple(name for name in LAYERS if name not in _IN_OTHER_LISTS),
}
_SHARED: Values = {"experts": "allgather", "layers": "shared-experts"}
# Not drawn: modules recomputed one by one need layers that have them.
_MODULES: tuple[Values, ...] = (
    {"recompute": "mlp"},
    {"recompute": "mlp", "tp": 2},
    {"recompute": "mlp", "tp": 2, "sp": True, "layers": "no-biases"},
    {"recompute": "mlp", "pp": 2, "embeddings": "tied", "frozen": "encoders"},
    {"recompute": "layernorm"},
    {"recompute": "layernorm", "tp": 2, "sp": True},
    {"recompute": "layernorm", "cp": 2, "packing": "packed", "layers": "no-biases"},
    {"recompute": "dense-modules", "tp": 2, "sp": True, "frozen": "first-half"},
    {"recompute": "dense-modules", "dp": 2, "reduction": "distributed-overlap"},
    {"recompute": "dense-modules", "tp": 2, "precision": "bf16"},
    {"recompute": "moe", "experts": "allgather"},
    {"recompute": "moe", "experts": "alltoall", "dp": 2, "ep": 2},
    {"recompute": "shared_experts", **_SHARED},
    {"recompute": "shared_experts", **_SHARED, "tp": 2, "sp": True},
    {"recompute": "moe-modules", **_SHARED, "tp": 2, "sp": True},
    {"recompute": "mla_up_proj", "layers": "latent"},
    {"recompute": "mla-modules", "layers": "latent"},
    {"recompute": "mla-modules", "layers": "latent", "pp": 2, "embeddings": "tied"},
)
FULL_SIZE = _DRAWN + len(_MODULES)


def is_valid(v: Values) -> bool:
    """Whether the values go together; those that do not are refused, or say the same twice."""
    if ranks_of(v) > MAX_RANKS:
        return False
    micro_batches, rest = divmod(_samples(v), v["micro_batch"] * v["dp"])
    return (
        (not rest and micro_batches >= 1)
        and (not v["sp"] or v["tp"] > 1)
        and (v["vpp"] is None or (v["pp"] > 1 and micro_batches % v["pp"] == 0))
        and (v["stages"] == "even" or v["pp"] > 1)
        and _fits_experts(v)
        and (v["reduction"] == "plain" or v["dp"] * v["cp"] > 1)
    )


def ranks_of(v: Values) -> int:
    """Processes that a cell takes."""
    ranks: int = v["tp"] * v["cp"] * v["pp"] * v["dp"]
    if v.get("encoders", "language") != "language":
        ranks += v["images_tp"] * v["images_dp"]
        if v["encoders"] == "apart":
            ranks += v["sounds_tp"] * v["sounds_dp"]
    return ranks


def _samples(v: Values) -> int:
    """Of a global batch: as many as divide among its replicas, and its stages."""
    return 6 if 3 in (v["dp"], v["pp"]) else len(MEDIA[0])


def _fits_experts(v: Values) -> bool:
    if v["experts"] == "none":
        return v["ep"] == 1 and v["etp"] is None
    etp = v["etp"] or v["tp"]
    across = v["tp"] * v["cp"] * v["dp"]
    return (
        across % (etp * v["ep"]) == 0
        and (v["tp"] == 1 or v["sp"])
        and (v["etp"] is None or v["tp"] > 1)
        # gloo cannot gather unequal parts
        and (v["experts"] == "allgather" or etp == 1)
    )


def make_cell(v: Values) -> Cell:
    chunks = v["pp"] * (v["vpp"] or 1)
    layers = max(2, chunks) + (v["stages"] == "uneven")
    if v["layers"] == "deepstack" and v["pp"] * (v["vpp"] or 1) < 4:
        layers += layers  # a layer for each level, as many on each stage
    stages = ""
    if v["stages"] == "uneven":
        stages = "|".join(["Et", *["t"] * (chunks - 2), "ttL"])
    elif v["stages"] == "embedding-alone":
        stages = "|".join(["E", *["t"] * (chunks - 2), "t" * (layers - chunks + 2) + "L"])
    layout = Layout(
        tp=v["tp"],
        pp=v["pp"],
        cp=v["cp"],
        ep=v["ep"],
        dp=v["dp"],
        etp=v["etp"],
        dispatcher="alltoall" if v["experts"] == "none" else v["experts"],
        vpp=v["vpp"],
        stages=stages,
        sequence_parallel=v["sp"],
        recompute=v["recompute"],
        micro_batch=v["micro_batch"],
        packed=v["packing"] == "packed",
        **REDUCTIONS[v["reduction"]],
    )
    design = Design(
        layers=layers,
        experts=0 if v["experts"] == "none" else _EXPERTS,
        bf16=v["precision"] == "bf16",
        tied=v["embeddings"] == "tied",
        learned_positions=v["positions"] == "learned",
        mrope=v["positions"] == "mrope",
        spans=v["attention"] == "spans",
        media=v["media"] == "some",
        samples=_samples(v),
        **FROZEN[v["frozen"]],
        **LAYERS[v["layers"]],
    )
    if "images_tp" in v:
        own = {axis: v[axis] for axis in ENCODER_AXES if axis in v}
        layout = GridLayout(
            **{one.name: getattr(layout, one.name) for one in fields(layout)}, **own
        )
    return layout, design


def name_of(v: Values) -> str:
    """The values that are not the first of their axis: ``tp2-sp-cp2-tied``."""
    return "-".join(features(v)) or "one-rank"


def features(v: Values) -> list[str]:
    """One word for each value that is not the first of its axis."""
    words = [_word(axis, v[axis]) for axis, values in AXES.items() if v[axis] != values[0]]
    if "images_tp" in v:
        words += [f"images:{_sizes(v, 'images')}", f"sounds:{_sizes(v, 'sounds')}"]
        words += [v["activations"], *([v["encoders"]] if "encoders" in v else [])]
    return words


def _sizes(v: Values, modality: str) -> str:
    dp = v.get(f"{modality}_dp")
    return f"tp{v[f'{modality}_tp']}" + ("" if dp is None else f":dp{dp}")


def _word(axis: str, value: Any) -> str:
    if axis in ("frozen", "layers", "recompute", "stages"):
        return f"{axis}:{value}"
    if axis == "media":
        return "no-media"
    if axis == "micro_batch":
        return f"micro{value}"
    if axis == "reduction":
        return str(value)
    if isinstance(value, bool):
        return axis
    return f"{axis}{value}" if isinstance(value, int) else str(value)


def pair_cells() -> list[Values]:
    """Few cells in which every two values that go together do so once; the smaller axes only.

    And those that recompute modules one by one.
    """
    return [*_drawn_pairs(), *listed_cells()]


def value_cells() -> list[Values]:
    """Fewer of these, in which every value stands that stands in any."""
    cells, chosen = pair_cells(), list[Values]()
    wanted = {item for values in cells for item in values.items()}
    while wanted:
        best = max(cells, key=lambda values: len(values.items() & wanted))
        wanted -= best.items()
        chosen.append(best)
    return chosen


def listed_cells() -> list[Values]:
    """Layers and what they meet, listed and not drawn."""
    first = {axis: values[0] for axis, values in AXES.items()}
    return [first | values for values in _MODULES]


@cache
def _drawn_pairs() -> tuple[Values, ...]:
    return tuple(cover(partial(draw, _SMALL), Covered(2)))


@cache
def _all_cells() -> tuple[Values, ...]:
    pairs = _drawn_pairs()
    drawn = list(cover(partial(draw, AXES), Covered(3), first=pairs, limit=_DRAWN))
    return (*pairs, *listed_cells(), *drawn[len(pairs) :])


def all_cells() -> list[Values]:
    """``FULL_SIZE`` cells, those of ``pair_cells`` first."""
    return list(_all_cells())


# What the quick set draws from: one size of each kind of parallelism is enough there.
_SMALL = AXES | {
    "tp": (1, 2),
    "cp": (1, 2),
    "pp": (1, 2),
    "dp": (1, 2),
    "ep": (1, 2),
}
# Values that weaken what a cell shows are drawn less often than the others of their axis.
_WEIGHTS: dict[str, tuple[int, ...]] = {
    "precision": (3, 1),
    "media": (5, 1),
    "frozen": (6, 1, 1, 1, 1),
    "recompute": (4, 1, 1, 1, 1, *(0 for _ in LISTED)),
}

_CUMULATED = {axis: tuple(accumulate(weights)) for axis, weights in _WEIGHTS.items()}


class Cover(Protocol):
    """What stands in cells already."""

    def add(self, cell: Values) -> None:
        """Take note of a cell."""

    def missing(self, cell: Values) -> int:
        """How much of a cell is new."""


def cover(
    drawn: Callable[[random.Random], Values],
    covered: Cover,
    *,
    first: Iterable[Values] = (),
    limit: int | None = None,
) -> Iterator[Values]:
    """Greedily: each time the candidate with most that is new, per rank.

    Args:
        drawn: gives a candidate.
        covered: what there is of it.
        first: cells that are there already, and come first.
        limit: cells in all; None for as many as cover what can be.
    """
    generator = random.Random(20)
    names: set[str] = set()
    for cell in first:
        covered.add(cell)
        names.add(name_of(cell))
        yield cell
    dry = 0  # rounds without anything new
    while dry < _DRY and (limit is None or len(names) < limit):
        best, gain = None, 0.0
        for _ in range(_CANDIDATES):
            candidate = drawn(generator)
            ranks = ranks_of(candidate)
            new = covered.missing(candidate)
            if new / ranks**1.5 > gain and name_of(candidate) not in names:
                best, gain = candidate, new / ranks**1.5
        dry = 0 if best else dry + 1
        if best:
            covered.add(best)
            names.add(name_of(best))
            yield best


def draw(axes: dict[str, tuple[Any, ...]], generator: random.Random) -> Values:
    """A valid cell."""
    number = generator.random
    while True:
        # Drawn for each axis in any case, so that the next one has the same.
        values: Values = {
            axis: choices[
                bisect(_CUMULATED[axis], number() * _CUMULATED[axis][-1])
                if axis in _CUMULATED
                else int(number() * len(choices))
            ]
            for axis, choices in axes.items()
            if axis != "layers"
        }
        settled: list[str] = ["layers"]
        if values["tp"] == 1:
            settled += ("sp", "etp")
        if values["pp"] == 1:
            settled += ("vpp", "stages")
        if values["experts"] == "none":
            settled += ("ep", "etp")
        for axis in settled:
            values[axis] = axes[axis][0]
        if is_valid(values):
            return values


class Covered:
    """Which combinations of so many values stand in a cell already, whatever the layers."""

    def __init__(self, strength: int) -> None:
        self._axes = [axis for axis in AXES if axis != "layers"]
        items = [(axis, value) for axis in self._axes for value in AXES[axis]]
        self._numbers = {item: number for number, item in enumerate(items)}
        self._chosen = np.array(list(combinations(range(len(self._axes)), strength))).T
        self._seen = np.zeros((len(items),) * strength, dtype=bool)

    def add(self, cell: Values) -> None:
        """All combinations of a cell's values."""
        self._seen[self._places(cell)] = True

    def missing(self, cell: Values) -> int:
        """How many of a cell's combinations are new."""
        return int((~self._seen[self._places(cell)]).sum())

    def _places(self, cell: Values) -> tuple[np.ndarray, ...]:
        numbers = np.array([self._numbers[axis, cell[axis]] for axis in self._axes])
        return tuple(numbers[self._chosen])
