"""Rows between modules whose process grids lie on the same ranks.

Legend: N rows of one modality, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron.core.models.mimo.alignment import AlignmentPlan, Encoded
from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig
from megatron.core.models.mimo.config.grids import same_ranks
from megatron.core.models.mimo.model.grids.wide_rows import join_levels, split_levels
from megatron.core.models.mimo.submodules.encoder_output import levels_of

Bridges = dict[tuple[str, str], ColocatedBridgeCommunicator]


def build_bridges(mimo_config: MimoModelConfig) -> Bridges:
    """What takes each modality's rows to the language model's layout; {} where nothing does.

    Every rank calls it, for groups are created.
    """
    grids = mimo_config.module_to_grid_map
    if grids is None or not same_ranks(grids) or mimo_config.modality_inputs_of != "encoders":
        return {}
    return {
        (name, MIMO_LANGUAGE_MODULE_KEY): ColocatedBridgeCommunicator(
            src_grid=grids[name],
            dest_grid=grids[MIMO_LANGUAGE_MODULE_KEY],
            src_module_name=name,
            dest_module_name=MIMO_LANGUAGE_MODULE_KEY,
            dim_mapping={"b": 0, "h": 1},
        )
        for name in mimo_config.modality_submodules_spec
    }


def bridge_rows(
    rows: Mapping[str, Encoded],
    bridges: Bridges,
    submodules: nn.ModuleDict,
    plan: AlignmentPlan,
    *,
    empty_H: torch.Tensor,
) -> dict[str, Encoded]:
    """The rows that this rank's replica of the language model reads, of every modality.

    All ranks take part, modality by modality, whether or not they have rows.

    Args:
        rows: modality -> rows that this rank's replica of the encoder gave.
        bridges: one for every modality.
        submodules: modality -> ``ModalitySubmodules``.
        plan: plan of this rank's replica of the language model.
        empty_H: a vector like one row.
    """
    taken: dict[str, Encoded] = {}
    for (name, _), bridge in bridges.items():
        levels = levels_of(submodules[name])
        wide_NH = join_levels(rows.get(name), levels, empty_H)
        wide_NH = bridge.communicate(wide_NH, count=plan.counts.get(name, 0))
        taken[name] = split_levels(wide_NH, levels)
    return taken
