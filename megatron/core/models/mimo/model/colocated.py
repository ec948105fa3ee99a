"""Modules with process grids of their own on the same ranks: what is refused, groups, bridges.

Legend: N rows of one modality, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.alignment import AlignmentPlan, Encoded
from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig, RankRole
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.config.grids import Geometry, same_ranks
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.model.disjoint import refuse_overlaps, refuse_untaken, role_apart
from megatron.core.models.mimo.model.wide_rows import apart, side_by_side
from megatron.core.utils import unwrap_model

Bridges = dict[tuple[str, str], ColocatedBridgeCommunicator]


def refuse_grids(mimo_config: MimoModelConfig) -> None:
    """Refuse grids that no layout runs, and those under which gradients would be scaled wrongly.

    Raises:
        ConfigError: (a ``ValueError``) an empty map; sizes that the language model's configuration
            contradicts; a loss that is averaged by data-parallel ranks that differ in number.
        UnsupportedError: (a ``RuntimeError``) modules that share some of their ranks; encoders
            with context parallelism, or with stages on the language model's ranks; heads.
    """
    grids = mimo_config.module_to_grid_map
    if grids is None:
        return
    if not grids:
        raise ConfigError(
            "module_to_grid_map is empty; pass None for the uniform layout or a grid per module"
        )
    missing = sorted(name for name, grid in grids.items() if not hasattr(grid, "dim_names"))
    if missing:
        raise ConfigError(
            f"module_to_grid_map has no grid for {missing}, but {grids[missing[0]]!r}; expected a "
            "HyperCommGrid for every module"
        )
    if mimo_config.heads:
        raise UnsupportedError(
            f"module_to_grid_map and heads {sorted(mimo_config.heads)}: a head belongs to no "
            "module with a grid; leave one of them away"
        )
    geometries = {name: Geometry.of(name, grid) for name, grid in grids.items()}
    together = same_ranks(grids)
    if not together:
        refuse_overlaps(geometries)
        refuse_untaken(mimo_config)
    language = geometries.pop(MIMO_LANGUAGE_MODULE_KEY)
    _check_sizes(mimo_config, language)
    _check_scaling(mimo_config, language, geometries)
    if together:
        _refuse_cut_encoders(geometries)
        _refuse_cut_language(mimo_config, language)


def _refuse_cut_encoders(geometries: Mapping[str, Geometry]) -> None:
    for name, geometry in geometries.items():
        for axis in ("pp", "cp"):
            if geometry.sizes[axis] != 1:
                raise UnsupportedError(
                    f"the grid of {name!r} has {axis} = {geometry.sizes[axis]}: encoders on the "
                    "language model's ranks are parallel by tp and dp; use larger ones of these"
                )


def _check_sizes(mimo_config: MimoModelConfig, language: Geometry) -> None:
    config = language_config(mimo_config)
    for axis, field in (
        ("tp", "tensor_model_parallel_size"),
        ("cp", "context_parallel_size"),
        ("pp", "pipeline_model_parallel_size"),
    ):
        if getattr(config, field) != language.sizes[axis]:
            raise ConfigError(
                f"the grid of 'language' has {axis} = {language.sizes[axis]}, and its "
                f"configuration says {field} = {getattr(config, field)}; give both the same"
            )


def _refuse_cut_language(mimo_config: MimoModelConfig, language: Geometry) -> None:
    cut = [axis for axis in ("pp", "cp") if language.sizes[axis] > 1]
    if cut and mimo_config.modality_inputs_of == "encoders":
        raise UnsupportedError(
            f"a language model with {' and '.join(cut)} beside encoders on grids of their own "
            "needs modality_inputs_of='language' in MimoModelConfig and the schedule EncodeFirst, "
            "which runs the encoders on every rank before the language model's schedule"
        )


def _check_scaling(
    mimo_config: MimoModelConfig, language: Geometry, modalities: Mapping[str, Geometry]
) -> None:
    if language_config(mimo_config).calculate_per_token_loss:
        return
    for name, geometry in modalities.items():
        if geometry.sizes["dp"] != language.sizes["dp"]:
            raise ConfigError(
                f"calculate_per_token_loss=False averages gradients over data-parallel ranks, of "
                f"which {name!r} has {geometry.sizes['dp']} and 'language' {language.sizes['dp']}: "
                f"those of {name!r} would be {language.sizes['dp']}/{geometry.sizes['dp']} of what "
                "they are; set calculate_per_token_loss=True in the configurations of all modules"
            )


def role_of(mimo_config: MimoModelConfig) -> RankRole:
    """Which modules this rank builds; with grids, encoders in the first chunk of their ranks."""
    grids = mimo_config.module_to_grid_map
    params = mimo_config.language_model_spec.params
    if grids is not None and not same_ranks(grids):
        return role_apart(grids, params)
    encoders = None
    if mimo_config.module_to_grid_map is not None:
        encoders = not params.get("vp_stage")
    return RankRole.uniform(
        mimo_config.modality_submodules_spec,
        pre_process=params.get("pre_process", True),
        post_process=params.get("post_process", True),
        encoders=encoders,
    )


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
        rows: of the encoder replica's inputs.
        bridges: of every modality.
        submodules: modality -> ``ModalitySubmodules``.
        plan: of the language model's replica.
        empty_H: a vector like one row.
    """
    taken: dict[str, Encoded] = {}
    for (name, _), bridge in bridges.items():
        levels = getattr(unwrap_model(submodules[name]), "num_levels", 0)
        wide_NH = side_by_side(rows.get(name), levels, empty_H)
        wide_NH = bridge.communicate(wide_NH, count=plan.counts.get(name, 0))
        taken[name] = apart(wide_NH, levels)
    return taken


def refuse_encoding_alone(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` for a forward that would have to encode by itself and cannot."""
    if mimo_config.module_to_grid_map is None or mimo_config.modality_inputs_of == "encoders":
        return
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "a model with modality_inputs_of='language' is trained by the schedule EncodeFirst, "
            "which gives forward the encoded_rows; call the schedule, or forward under no_grad"
        )
    if not same_ranks(mimo_config.module_to_grid_map):
        raise UnsupportedError(
            "a forward of a model whose encoders are on ranks of their own got no encoded_rows; "
            "call the schedule EncodeFirst, or load the checkpoint in another layout"
        )
    apart = encoders_apart(mimo_config.module_to_grid_map)
    if apart:
        raise UnsupportedError(
            f"the tensor-parallel ranks of {apart} are in several replicas or stages of the "
            "language model, so that they do not get the same inputs in a forward; call the "
            "schedule EncodeFirst, or load the checkpoint in another layout"
        )


def encoders_apart(grids: Mapping[str, Any]) -> list[str]:
    """Modalities whose tensor-parallel ranks are not all on one stage of one replica.

    Of the language model; without the schedule ``EncodeFirst`` these cannot encode.
    """
    if not same_ranks(grids):
        return [name for name in grids if name != MIMO_LANGUAGE_MODULE_KEY]
    language = Geometry.of(MIMO_LANGUAGE_MODULE_KEY, grids[MIMO_LANGUAGE_MODULE_KEY])
    apart = []
    for name in (name for name in grids if name != MIMO_LANGUAGE_MODULE_KEY):
        encoder = Geometry.of(name, grids[name])
        for replica in range(encoder.sizes["dp"]):
            positions = [language.positions[rank] for rank in encoder.where(dp=replica)]
            if len({(position.dp, position.pp) for position in positions}) > 1:
                apart.append(name)
                break
    return apart


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
