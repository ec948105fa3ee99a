"""Building the modules of the modalities that this rank runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.config.grids import Geometry, groups_of, has_groups
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.model.encoding.encoder_splits import split_encoders
from megatron.core.models.mimo.model.grids.refusals import refuse_stages
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def build_modalities(
    mimo_config: MimoModelConfig,
    role: RankRole,
    cp_group: ProcessGroup | None,
    tp_group: ProcessGroup | None,
) -> nn.ModuleDict:
    """Build the modules of the modalities that this rank runs; split their encoders as asked.

    Args:
        mimo_config: what the model is built from.
        role: which modules are this rank's.
        cp_group: the language model's context-parallel ranks; None for Megatron's global group.
        tp_group: its tensor-parallel ranks; None for Megatron's global group.

    Raises:
        ConfigError: encoders that cannot be split as asked, or cut into stages as their grid is.
    """
    submodules = nn.ModuleDict()
    with _drawing_as_without_encoders(role, mimo_config):
        for name in role.modality_module_names:
            spec, stage = mimo_config.modality_submodules_spec[name], role.modules[name]
            with _drawing_of_stage(name, mimo_config):
                submodules[name] = spec.module.from_spec(
                    spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
                )
    if mimo_config.module_to_grid_map is None:
        split_encoders(submodules, mimo_config, cp_group, tp_group)
    else:
        _give_groups(submodules, mimo_config)
    if role.mode is ModuleLayout.NON_COLOCATED:
        refuse_stages(submodules)
    return submodules


@contextmanager
def _drawing_as_without_encoders(role: RankRole, mimo_config: MimoModelConfig) -> Iterator[None]:
    """On later pipeline stages, put the generators back once encoders have been built.

    The language model's layers are then drawn there as they are without encoders.
    """
    is_first = role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY) or not role.has_language_module
    if mimo_config.module_to_grid_map is None or is_first:
        yield
        return
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            tracker.set_states(states)


@contextmanager
def _drawing_of_stage(name: str, mimo_config: MimoModelConfig) -> Iterator[None]:
    """Let later stages of a modality draw from seeds of their own.

    As Megatron has it for stages of the language model.
    """
    grids = mimo_config.module_to_grid_map
    stage = 0
    if grids is not None:
        stage = Geometry.of(name, grids[name]).positions[torch.distributed.get_rank()].pp
    if not stage:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + 100 * stage)
        yield


def _give_groups(submodules: nn.ModuleDict, mimo_config: MimoModelConfig) -> None:
    """Let each modality know its grid's groups, where a script has not told it."""
    for name, module in submodules.items():
        submodule: Any = module
        grid = (mimo_config.module_to_grid_map or {}).get(name)
        if grid is None or not hasattr(submodule, "pg_collection") or not has_groups(grid):
            continue
        if submodule.pg_collection is None:
            submodule.pg_collection = groups_of(name, grid)
