"""Process grids as geometry: where every rank stands in a grid, and the process groups of a grid.

Legend of axes: tp tensor, cp context, dp data, pp pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a rank stands in a grid: its index along every axis."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A grid without its process groups.

    Attributes:
        sizes: axis -> size; 1 for an axis that the grid does not have.
        positions: rank -> where it stands, in the order of ranks.
    """

    sizes: Mapping[str, int]
    positions: Mapping[int, Position]

    @classmethod
    def of(cls, module: str, grid: HyperCommGrid) -> Geometry:
        """Read a grid, whatever the order of its axes.

        Args:
            module: name of the module, for errors.
            grid: its axes are some of ``AXES``; others have size 1.

        Raises:
            ConfigError: another axis has a size.
        """
        sizes = dict.fromkeys(AXES, 1)
        for name, size in zip(grid.dim_names, grid.shape, strict=True):
            if name in sizes:
                sizes[name] = int(size)
            elif size != 1:
                raise ConfigError(
                    f"the grid of {module!r} has an axis {name!r} of size {size}; expected axes "
                    f"among {', '.join(AXES)} (experts are a view of the grid: register_view)"
                )
        found: dict[int, dict[str, int]] = {}
        for axis in AXES:
            if axis not in grid.dim_names:
                continue
            for group in grid.get_rank_enum([axis]):
                for index, rank in enumerate(group):
                    found.setdefault(rank, {})[axis] = index
        ranks = range(grid.rank_offset, grid.rank_offset + grid.size)
        return cls(sizes=sizes, positions={r: Position(**found.get(r, {})) for r in ranks})

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of the grid, ascending."""
        return tuple(self.positions)

    def where(self, **wanted: int) -> tuple[int, ...]:
        """Ranks at the given indices, ascending: ``where(dp=1, pp=0)``."""
        return tuple(
            rank
            for rank, position in self.positions.items()
            if all(getattr(position, axis) == index for axis, index in wanted.items())
        )


def same_ranks(grids: Mapping[str, Any]) -> bool:
    """True where all grids span the same ranks."""
    return len({(grid.rank_offset, grid.size) for grid in grids.values()}) == 1


def is_on(grid: Any) -> bool:
    """True where this rank is one of the grid's."""
    last: int = grid.rank_offset + grid.size
    return bool(grid.rank_offset <= dist.get_rank() < last)


def connected(ranks: Sequence[int], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected components of ranks: each ascending, in the order of their first rank."""
    parent = {rank: rank for rank in ranks}

    def root(rank: int) -> int:
        while parent[rank] != rank:
            rank = parent[rank]
        return rank

    for one, other in links:
        parent[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault(root(rank), []).append(rank)
    return list(groups.values())


# Field of a collection -> axes of the grid's group, in the grid's own order of axes.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "dp_cp": ("dp", "cp"),
    "mp": ("tp", "pp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}


def groups_of(module: str, grid: HyperCommGrid) -> ProcessGroupCollection:
    """A grid's process groups as data parallelism and optimizers take them.

    A grid without context parallelism may lack its axis. Groups of experts are those of the view
    "expert" where the grid has one; else the module has no experts.

    Raises:
        ConfigError: a group was not created.
    """
    found = {}
    for field, axes in _GROUPS.items():
        held = [axis for axis in axes if axis in grid.dim_names]
        if not held:
            continue
        try:
            found[field] = grid.get_pg(held if len(held) > 1 else held[0])
        except KeyError as error:
            raise ConfigError(
                f"the grid of {module!r} has no process group over {held}; create it on every "
                f"rank: grid.create_pg({held})"
            ) from error
    groups = ProcessGroupCollection(**found)
    try:
        groups.tp_ep_pp = grid.get_pg(["expt_tp", "ep", "pp"], view="expert")
        groups.expt_dp = grid.get_pg("expt_dp", view="expert")
    except (KeyError, ValueError, TypeError):
        groups.tp_ep_pp, groups.expt_dp = groups.mp, groups.dp_cp
    return groups


def has_groups(grid: Any) -> bool:
    """True where a grid's groups were created, so that an optimizer can be built with them."""
    try:
        group = grid.get_pg("dp")
    except (KeyError, ValueError):
        return False
    return group is not None
