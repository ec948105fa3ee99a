"""Which modules a rank runs, and the process groups that its language model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.config.grids import Geometry, is_on, same_ranks
from megatron.core.models.mimo.config.role import ModuleLayout, ModuleStageInfo
from megatron.core.utils import unwrap_model


def role_of(mimo_config: MimoModelConfig) -> RankRole:
    """Which modules this rank builds; with grids, encoders in the first chunk of their ranks."""
    grids = mimo_config.module_to_grid_map
    params = mimo_config.language_model_spec.params
    if grids is not None and not same_ranks(grids):
        return _disjoint_role(grids, params)
    encoders = None
    if mimo_config.module_to_grid_map is not None:
        encoders = not params.get("vp_stage")
    return RankRole.uniform(
        mimo_config.modality_submodules_spec,
        pre_process=params.get("pre_process", True),
        post_process=params.get("post_process", True),
        encoders=encoders,
    )


def _disjoint_role(grids: Mapping[str, Any], language: Mapping[str, Any]) -> RankRole:
    """Which modules this rank builds; the language model's spec says which stage of it.

    Args:
        grids: grids of all modules; their groups need not have been created.
        language: the parameters of the language model's spec.

    Raises:
        RuntimeError: this rank is in no grid.
    """
    rank = dist.get_rank()
    modules = {}
    for name, grid in grids.items():
        if not is_on(grid):
            continue
        geometry = Geometry.of(name, grid)
        stage = geometry.positions[rank].pp
        first, last = stage == 0, stage == geometry.sizes["pp"] - 1
        if name == MIMO_LANGUAGE_MODULE_KEY:
            first, last = language.get("pre_process", first), language.get("post_process", last)
        modules[name] = ModuleStageInfo(is_first_stage=first, is_last_stage=last)
    if not modules:
        raise RuntimeError(
            f"Rank {rank} is not in any module grid of {sorted(grids)}; start fewer ranks or widen "
            "a grid"
        )
    return RankRole(modules=modules, mode=ModuleLayout.NON_COLOCATED)


def language_groups(
    mimo_config: MimoModelConfig,
    role: RankRole,
    cp_group: ProcessGroup | None,
    tp_group: ProcessGroup | None,
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """The groups that cut sequences: those given; with grids, else the language model's own."""
    grids = mimo_config.module_to_grid_map
    if grids is None:
        return cp_group, tp_group
    if not role.has_language_module:
        return None, None
    own = mimo_config.language_model_spec.params.get("pg_collection")
    config = language_config(mimo_config)
    if cp_group is None and config.context_parallel_size > 1:
        cp_group = getattr(own, "cp", None) or grids[MIMO_LANGUAGE_MODULE_KEY].get_pg("cp")
    if tp_group is None and config.tensor_model_parallel_size > 1:
        tp_group = getattr(own, "tp", None) or grids[MIMO_LANGUAGE_MODULE_KEY].get_pg("tp")
    return cp_group, tp_group


def groups_for_checkpoints(
    mimo_config: MimoModelConfig, language_model: Any
) -> tuple[dict[str, ProcessGroup], ProcessGroup | None]:
    """The language model's own groups: what goes into the metadata, and the tensor-parallel one.

    Nothing where Megatron's global groups are the language model's.
    """
    if language_model is None:  # on ranks of encoders, whose modules bring their own
        return {}, None
    groups: Any = getattr(unwrap_model(language_model), "pg_collection", None)
    if mimo_config.module_to_grid_map is None or getattr(groups, "dp_cp", None) is None:
        return {}, None
    return {"dp_cp_group": groups.dp_cp}, groups.tp
