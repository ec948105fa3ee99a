"""A language model's grid as Megatron's pipeline of modules takes it, context parallelism included.

``MultiModulePipelineCommunicator`` refuses context parallelism. What it does with tensor-parallel
ranks, the same rows for all of them, is what context-parallel ranks need as well, where the model
sums the gradients that they have for parts of the sequence: ``MimoModel`` does.
"""

from __future__ import annotations

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.grids import AXES, Geometry
from megatron.core.models.mimo.errors import UnsupportedError


def grid_for_pipeline(grid: HyperCommGrid) -> HyperCommGrid:
    """A grid over the same ranks that counts context-parallel ranks among tensor-parallel ones.

    Give it to ``MultiModulePipelineCommunicator`` in place of the language model's. The grid
    itself where it has no context parallelism; else all ranks of the job call it, for the groups
    of pipeline stages are made.

    Args:
        grid: with the axes tp, cp, dp and pp, of which tp and cp vary fastest.

    Raises:
        UnsupportedError: (a ``RuntimeError``) another order of axes.
    """
    sizes = Geometry.of("language", grid).sizes
    if sizes["cp"] == 1:
        return grid
    order = [axis for axis in grid.dim_names if axis in AXES]
    if {*order[:2]} != {"tp", "cp"}:
        raise UnsupportedError(
            f"a pipeline of modules with a grid of the axes {order}, whose context-parallel ranks "
            "are not beside its tensor-parallel ones; make it with tp and cp first"
        )
    axes = ["tp", *order[2:]]
    shape = [sizes["tp"] * sizes["cp"], *(sizes[axis] for axis in order[2:])]
    merged = HyperCommGrid([*shape, 1], [*axes, "cp"], grid.rank_offset)
    merged.create_pg("pp")
    return merged
