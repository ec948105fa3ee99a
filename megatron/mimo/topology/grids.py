"""The process grids of a job: made once from its components, given back at its end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.grids import groups_of, is_on
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.mimo.process.quiet import at_level
from megatron.mimo.topology.components import AXES, LANGUAGE, Component

__all__ = ["Grids", "build_grids"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Grids:
    """What a model is built on.

    Attributes:
        by_module: module -> grid; the language model's is without groups, which are Megatron's.
        groups: modality -> its process groups; where it is on other ranks, of this rank alone.
    """

    by_module: Mapping[str, Any]
    groups: Mapping[str, ProcessGroupCollection]
    _alone: dist.ProcessGroup

    def destroy(self) -> None:
        """Give the groups back. Collective over the ranks of each."""
        for grid in self.by_module.values():
            grid.destroy()
        dist.destroy_process_group(self._alone)


def build_grids(components: Mapping[str, Component]) -> Grids:
    """Make the grids, and the groups of the modalities; modalities of equal sizes share theirs.

    Every rank of the default group calls it, with equal components.
    """
    ranks = [[rank] for rank in range(dist.get_world_size())]
    alone: Any = dist.new_subgroups_by_enumeration(ranks)[0]
    known: dict[tuple[int, ...], HyperCommGrid] = {}
    by_module: dict[str, Any] = {}
    groups = {}
    for name, component in components.items():
        if name == LANGUAGE:
            shape = [getattr(component, axis) for axis in AXES]
            by_module[name] = HyperCommGrid(shape, [*AXES], component.rank_offset)
            continue
        sizes = component.tp, component.dp, component.pp, component.rank_offset
        if sizes not in known:
            known[sizes] = _encoder_grid(component)
        by_module[name] = known[sizes]
        groups[name] = _encoder_groups(name, known[sizes], alone)
    return Grids(by_module=by_module, groups=groups, _alone=alone)


def _encoder_grid(component: Component) -> HyperCommGrid:
    sizes, axes = [component.tp, component.dp, component.pp], ["tp", "dp", "pp"]
    grid = HyperCommGrid(sizes, axes, component.rank_offset)
    with at_level("absl", logging.WARNING):  # megatron-core tells it of every group of a grid
        for of in (*axes, ["tp", "dp"], ["tp", "pp"], axes):
            grid.create_pg(of)
    return grid


def _encoder_groups(
    name: str, grid: HyperCommGrid, alone: dist.ProcessGroup
) -> ProcessGroupCollection:
    """An encoder's groups; those of axes that it does not have hold this rank alone."""
    if not is_on(grid):
        return ProcessGroupCollection(tp=alone, cp=alone, dp=alone, pp=alone, ep=alone)
    groups = groups_of(name, grid)
    groups.cp = groups.ep = alone
    groups.tp_cp = groups.tp_ep = groups.expt_tp = groups.tp
    groups.tp_dp_cp = grid.get_pg(["tp", "dp"])
    groups.embd = groups.pos_embd = None
    return groups
