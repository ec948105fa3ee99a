"""Process grids that no layout runs, and forwards that one cannot run: refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY, MimoModelConfig
from megatron.core.models.mimo.config.base_configs import language_config
from megatron.core.models.mimo.config.grids import Geometry, same_ranks
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.model.merging.level_route import untaken_levels
from megatron.core.models.mimo.signatures import names_argument


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
            "module with a grid; leave out one of the two"
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


def refuse_overlaps(geometries: Mapping[str, Geometry]) -> None:
    """Refuse modules that are neither on the same ranks nor on ranks of their own.

    Args:
        geometries: grids of all modules, which are not all on the same ranks.

    Raises:
        UnsupportedError: (a ``RuntimeError``) an encoder on some ranks of the language model, or
            on some ranks of another encoder; encoders with context parallelism.
    """
    language = set(geometries[MIMO_LANGUAGE_MODULE_KEY].ranks)
    extents = {
        name: f"ranks {geometry.ranks[0]} to {geometry.ranks[-1]}"
        for name, geometry in geometries.items()
    }
    encoders = {n: g for n, g in geometries.items() if n != MIMO_LANGUAGE_MODULE_KEY}
    for name, geometry in encoders.items():
        if language & set(geometry.ranks):
            raise UnsupportedError(
                f"module_to_grid_map puts {name!r} on ranks of the language model, and not all "
                f"modules on the same ranks: {extents}; give all the same ranks, or the language "
                "model ranks that no encoder has"
            )
        for other, theirs in encoders.items():
            shared = set(geometry.ranks) & set(theirs.ranks)
            if shared and geometry.ranks != theirs.ranks:
                raise UnsupportedError(
                    f"module_to_grid_map lets {name!r} and {other!r} share some of their ranks: "
                    f"{extents}; give both the same ranks, or ranks of their own"
                )
        if geometry.sizes["cp"] != 1:
            raise UnsupportedError(
                f"the grid of {name!r} has cp = {geometry.sizes['cp']}: encoders are parallel by "
                "tp, pp and dp; use larger ones of these"
            )


def refuse_untaken(mimo_config: MimoModelConfig) -> None:
    """Raise ``UnsupportedError`` for levels that the language model, on other ranks, leaves out."""
    kind: Any = mimo_config.language_model_spec.module
    if not hasattr(kind, "forward"):  # an import path; the model checks it once it is built
        return
    for name, spec in mimo_config.modality_submodules_spec.items():
        levels = len((spec.submodules or {}).get("level_projections") or ())
        if levels and not names_argument(kind.forward, "level_rows"):
            raise untaken_levels([name], levels, kind.__name__)


def refuse_stages(submodules: nn.ModuleDict) -> None:
    """Refuse encoders that are cut into pipeline stages and cannot be.

    Args:
        submodules: modality -> ``ModalitySubmodules``, those of this rank.

    Raises:
        ConfigError: (a ``ValueError``) several encoders of one modality, one with levels, or one
            that does not take what a stage before it has given.
    """
    for name, module in submodules.items():
        submodule: Any = module
        if submodule.is_first_stage and submodule.is_last_stage:
            continue
        encoders = dict(submodule.encoders.items())
        if len(encoders) != 1 or submodule.num_levels:
            raise ConfigError(
                f"{name!r} is cut into pipeline stages and has the encoders {sorted(encoders)}; "
                "expected one, without levels of its rows: give others a modality of their own, "
                "or their grid pp = 1"
            )
        ((encoder_name, encoder),) = encoders.items()
        takes = "hidden_states" in signature(encoder.forward).parameters
        if not (takes or hasattr(encoder, "set_input_tensor")):
            raise ConfigError(
                f"{name!r} is cut into pipeline stages, and its encoder {encoder_name!r} "
                f"({type(encoder).__name__}) has neither set_input_tensor nor an argument "
                "hidden_states by which it would go on from the stage before; give its grid "
                "pp = 1, or an encoder of several stages"
            )


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
    across = modalities_across_replicas(mimo_config.module_to_grid_map)
    if across:
        raise UnsupportedError(
            f"the tensor-parallel ranks of {across} are in several replicas or stages of the "
            "language model, so that they do not get the same inputs in a forward; call the "
            "schedule EncodeFirst, or load the checkpoint in another layout"
        )


def modalities_across_replicas(grids: Mapping[str, Any]) -> list[str]:
    """Modalities with tensor-parallel ranks in several replicas or stages of the language model.

    These have other inputs in a forward, so that only the schedule ``EncodeFirst`` can encode.
    """
    if not same_ranks(grids):
        return [name for name in grids if name != MIMO_LANGUAGE_MODULE_KEY]
    language = Geometry.of(MIMO_LANGUAGE_MODULE_KEY, grids[MIMO_LANGUAGE_MODULE_KEY])
    across = []
    for name in (name for name in grids if name != MIMO_LANGUAGE_MODULE_KEY):
        encoder = Geometry.of(name, grids[name])
        for replica in range(encoder.sizes["dp"]):
            positions = [language.positions[rank] for rank in encoder.where(dp=replica)]
            if len({(position.dp, position.pp) for position in positions}) > 1:
                across.append(name)
                break
    return across
