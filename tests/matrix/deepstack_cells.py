"""Cells whose decoder layers take levels of image rows (deepstack)."""

from __future__ import annotations

from tests.matrix.cells import AXES, Values

__all__ = ["deepstack_cells"]

# Levels of image rows, whose layers are on any pipeline stage; each on top of the first values.
_LEVELS: tuple[Values, ...] = (
    {},
    {"tp": 2, "sp": True},
    {"cp": 2, "packing": "packed"},
    {"tp": 2, "sp": True, "cp": 2, "positions": "mrope", "packing": "packed"},
    {"pp": 2},
    {"pp": 2, "media": "none"},
    {"pp": 4, "recompute": "uniform", "positions": "mrope"},
    {"pp": 4, "stages": "embedding-alone", "embeddings": "tied"},
    {"pp": 2, "vpp": 2, "stages": "uneven", "recompute": "block"},
    {"pp": 2, "vpp": 2, "tp": 2, "sp": True, "packing": "packed", "micro_batch": 1},
    {"pp": 2, "vpp": 2, "dp": 2, "reduction": "distributed-overlap"},
    {"pp": 2, "cp": 2, "dp": 2, "reduction": "overlap", "attention": "spans"},
    {"pp": 4, "tp": 2, "sp": True, "recompute": "projections", "stages": "uneven"},
    {"pp": 2, "frozen": "encoders"},
    {"pp": 2, "frozen": "language", "recompute": "uniform"},
    {"pp": 2, "frozen": "first-half", "vpp": 2},
    {"pp": 2, "frozen": "all-but-projection", "dp": 2, "reduction": "overlap"},
    {"pp": 2, "precision": "bf16", "vpp": 2},
    {"experts": "alltoall", "ep": 2, "dp": 2, "recompute": "uniform"},
    {"experts": "allgather", "ep": 2, "pp": 2, "vpp": 2, "dp": 2, "recompute": "moe"},
    {"experts": "alltoall", "ep": 2, "cp": 2, "pp": 2, "vpp": 2, "packing": "packed"},
)


def deepstack_cells() -> list[Values]:
    """Cells with levels of image rows, listed and not drawn."""
    first = {axis: values[0] for axis, values in AXES.items()} | {"layers": "deepstack"}
    return [first | values for values in _LEVELS]
