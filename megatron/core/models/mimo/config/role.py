"""Which modules of the model this rank runs, and which stage of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid

MIMO_LANGUAGE_MODULE_KEY = "language"


class ModuleLayout(Enum):
    """How modules lie on ranks.

    COLOCATED: every module on the same ranks (the uniform layout, and grids that coincide).
    NON_COLOCATED: modules on ranks of their own.
    """

    COLOCATED = "colocated"
    NON_COLOCATED = "non_colocated"


@dataclass
class ModuleStageInfo:
    """This rank's pipeline stage within one module."""

    is_first_stage: bool
    is_last_stage: bool


@dataclass
class RankRole:
    """The modules that this rank runs: name -> stage, and the layout they come from."""

    modules: dict[str, ModuleStageInfo] = field(default_factory=dict)
    mode: ModuleLayout = ModuleLayout.COLOCATED

    @classmethod
    def build(
        cls,
        modality_module_names: Iterable[str],
        module_to_grid_map: Mapping[str, HyperCommGrid] | None = None,
    ) -> RankRole:
        """Derive the role from the grids; without grids every module is whole on every rank.

        Args:
            modality_module_names: the modalities, without the language model.
            module_to_grid_map: objects with ``rank_offset``, ``size``, ``dim_names`` and
                ``get_pg("pp")``; None for the uniform layout.

        Raises:
            ConfigError: the map is empty.
            RuntimeError: this rank is in no grid.
        """
        if module_to_grid_map is None:
            return cls.uniform(modality_module_names)
        if not module_to_grid_map:
            raise ConfigError(
                "module_to_grid_map is empty; pass None for the uniform layout or a grid per module"
            )
        extents = {(grid.rank_offset, grid.size) for grid in module_to_grid_map.values()}
        if len(extents) == 1:
            return cls.uniform(modality_module_names)
        return cls._from_grids(module_to_grid_map)

    @classmethod
    def uniform(
        cls,
        modality_module_names: Iterable[str],
        *,
        pre_process: bool = True,
        post_process: bool = True,
        encoders: bool | None = None,
    ) -> RankRole:
        """The role where every module is on the same ranks, or on those of the uniform layout.

        Args:
            modality_module_names: the modalities, without the language model.
            pre_process: this rank's language chunk holds the embedding.
            post_process: this rank's language chunk holds the output layer.
            encoders: this rank's chunk holds the encoders; by default where it holds the
                embedding, as in the uniform layout.
        """
        whole = ModuleStageInfo(is_first_stage=True, is_last_stage=True)
        held = pre_process if encoders is None else encoders
        modules = dict.fromkeys(modality_module_names, whole) if held else {}
        modules[MIMO_LANGUAGE_MODULE_KEY] = ModuleStageInfo(
            is_first_stage=pre_process, is_last_stage=post_process
        )
        return cls(modules=modules, mode=ModuleLayout.COLOCATED)

    @classmethod
    def _from_grids(cls, module_to_grid_map: Mapping[str, HyperCommGrid]) -> RankRole:
        rank = dist.get_rank()
        modules = {}
        for name, grid in module_to_grid_map.items():
            if not grid.rank_offset <= rank < grid.rank_offset + grid.size:
                continue
            first = last = True
            if "pp" in grid.dim_names:
                pp_group = grid.get_pg("pp")
                first = pp_group.rank() == 0
                last = pp_group.rank() == pp_group.size() - 1
            modules[name] = ModuleStageInfo(is_first_stage=first, is_last_stage=last)
        if not modules:
            extents = {
                name: f"{grid.rank_offset}..{grid.rank_offset + grid.size - 1}"
                for name, grid in module_to_grid_map.items()
            }
            raise RuntimeError(
                f"Rank {rank} is not in any module grid (grids hold ranks {extents}); "
                "start fewer ranks or widen a grid"
            )
        return cls(modules=modules, mode=ModuleLayout.NON_COLOCATED)

    @property
    def has_modality_modules(self) -> bool:
        """True where this rank runs an encoder."""
        return bool(self.modality_module_names)

    @property
    def has_language_module(self) -> bool:
        """True where this rank runs a part of the language model."""
        return MIMO_LANGUAGE_MODULE_KEY in self.modules

    @property
    def modality_module_names(self) -> list[str]:
        """The modalities that this rank runs."""
        return [name for name in self.modules if name != MIMO_LANGUAGE_MODULE_KEY]

    def is_first_stage(self, module_name: str) -> bool:
        """True where this rank holds the module's first stage; False for unknown names."""
        stage = self.modules.get(module_name)
        return stage is not None and stage.is_first_stage

    def is_last_stage(self, module_name: str) -> bool:
        """True where this rank holds the module's last stage; False for unknown names."""
        stage = self.modules.get(module_name)
        return stage is not None and stage.is_last_stage
