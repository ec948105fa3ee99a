"""Building the optimizers of a MimoModel's modules, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.config.grids import Geometry, groups_of, has_groups, is_on
from megatron.core.models.mimo.errors import ConfigError, UnsupportedError
from megatron.core.models.mimo.optimizer.combined import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.utils import unwrap_model

Overrides = Mapping[ParamKey, ParamGroupOverride]


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What one rank tells the others about its part of the model.

    Attributes:
        problems: why no optimizer can be built.
        ddp_configs: module trained on this rank -> how its gradients are reduced.
        matched: for each override, whether it fits a parameter of this rank.
    """

    problems: tuple[str, ...]
    ddp_configs: dict[str, DistributedDataParallelConfig]
    matched: tuple[bool, ...]


def get_mimo_optimizer(
    mimo_model: Any,
    config: OptimizerConfig,
    config_overrides: Overrides | None = None,
    *,
    use_gloo_process_groups: bool = False,
    kind: type[MimoOptimizer] = MimoOptimizer,
) -> MimoOptimizer:
    """Build one Megatron optimizer per module and combine them.

    Every rank calls it together with the others; over the default process group they agree on
    what is built, so that all of them build or all of them raise.

    Args:
        mimo_model: a ``MimoModel``, or the list of this rank's chunks of one under interleaved
            pipeline parallelism, whose language model and modality submodules are each wrapped
            in Megatron's ``DistributedDataParallel``; those without a trainable parameter need
            not be. Each module's process grid gives its groups, where it has one with groups; else
            the model's ``pg_collection``, where a script has set one.
        config: configuration for all modules.
        config_overrides: as ``get_megatron_optimizer`` takes them: what differs for some
            parameters (learning rate, weight decay). Names are those of the unwrapped model,
            "modality_submodules.images.*". None for Megatron's usual ones; a dictionary takes
            their place.
        use_gloo_process_groups: as ``get_megatron_optimizer`` takes it.
        kind: class of the combined optimizer, which says how its state in checkpoints is named.

    Raises:
        ConfigError: (a ``ValueError``) a module is not wrapped or wrapped for another kind of
            optimizer; an override for a name that no parameter has.
        UnsupportedError: (a ``RuntimeError``) an optimizer or option that works for single
            modules only.
    """
    _refuse(config)
    models = mimo_model if isinstance(mimo_model, list) else [mimo_model]
    modules = _modules(models)
    names = _parameter_names(modules)
    keys = tuple(config_overrides or ())
    problems = tuple(_problems(models, modules, config))
    trained: dict[str, list[Any]] = {
        name: [one for one in held if _is_trained(one)]
        for name, held in modules.items()
        if any(isinstance(one, DistributedDataParallel) and _is_trained(one) for one in held)
    }
    surveys = _gather(
        _Survey(
            problems=problems,
            ddp_configs={name: held[0].ddp_config for name, held in trained.items()},
            matched=tuple(any(key.matches(*pair) for pair in names.items()) for key in keys),
        )
    )
    _raise_problems(surveys, keys)
    grids = models[0].mimo_config.module_to_grid_map or {}
    infos = {}
    for name in modules:
        ddp_config = next((s.ddp_configs[name] for s in surveys if name in s.ddp_configs), None)
        grid = grids.get(name)
        elsewhere = grid is not None and not is_on(grid)
        groups = _own_groups(models[0]) if elsewhere else _groups(models[0], name)
        optimizer = None
        if ddp_config is not None:
            # Optimizers align their parameter groups over the world: a rank without the module
            # takes part with one that holds nothing.
            optimizer = get_megatron_optimizer(
                config,
                trained.get(name) or [_nothing(models[0].config, ddp_config, groups)],
                config_overrides=_by_full_name(config_overrides, names),
                use_gloo_process_groups=use_gloo_process_groups and grid is None,
                pg_collection=groups,
            )
        if elsewhere:  # of its ranks alone are the groups in which it steps
            optimizer = groups = None
        infos[name] = ModuleOptimizerInfo(optimizer, grid, groups, name in trained)
    device = next((parameter.device for parameter in models[0].parameters()), None)
    return kind(infos, config, device=device)


def _groups(model: Any, name: str) -> Any:
    """The process groups of a module; None for Megatron's global ones."""
    grid = (model.mimo_config.module_to_grid_map or {}).get(name)
    if grid is not None and has_groups(grid):
        return groups_of(name, grid)
    return getattr(model, "pg_collection", None)


def _own_groups(model: Any) -> Any:
    """The process groups of a module that this rank has."""
    grids = model.mimo_config.module_to_grid_map
    return _groups(model, next(name for name, grid in grids.items() if is_on(grid)))


def _refuse(config: OptimizerConfig) -> None:
    if config.optimizer not in ("adam", "sgd"):
        raise UnsupportedError(
            f"optimizer {config.optimizer!r} with one optimizer per module; expected 'adam' or "
            "'sgd'. Wrap the model as a whole and use get_megatron_optimizer for others"
        )
    if config.overlap_param_gather_with_optimizer_step:
        raise UnsupportedError(
            "overlap_param_gather_with_optimizer_step needs several chunks of one module; turn it "
            "off"
        )


def _modules(models: list[Any]) -> dict[str, list[nn.Module]]:
    """This rank's part of every module of the model, in the same order on all ranks."""
    model = models[0]
    if not hasattr(model, "mimo_config"):
        raise ConfigError(
            f"got a {type(model).__name__}, expected a MimoModel; a model that is wrapped as a "
            "whole has one optimizer: get_megatron_optimizer builds it"
        )
    if model.mimo_config.heads:
        raise UnsupportedError(
            f"one optimizer per module leaves out the heads {sorted(model.mimo_config.heads)}; "
            "wrap the model as a whole and use get_megatron_optimizer"
        )
    modules: dict[str, list[nn.Module]] = {
        name: [one.modality_submodules[name] for one in models if name in one.modality_submodules]
        for name in model.mimo_config.modality_submodules_spec
    }
    language = [one.language_model for one in models]
    modules[MIMO_LANGUAGE_MODULE_KEY] = [one for one in language if one is not None]
    return modules


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _each(modules: Mapping[str, list[nn.Module]]) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, held in modules.items() for module in held)


def _parameter_names(modules: Mapping[str, list[nn.Module]]) -> dict[nn.Parameter, str]:
    """Parameter -> its name in the unwrapped model."""
    names = {}
    for module_name, module in _each(modules):
        prefix = (
            "language_model"
            if module_name == MIMO_LANGUAGE_MODULE_KEY
            else f"modality_submodules.{module_name}"
        )
        for name, parameter in unwrap_model(module).named_parameters():
            names[parameter] = f"{prefix}.{name}"
    return names


def _problems(
    models: list[Any], modules: Mapping[str, list[nn.Module]], config: OptimizerConfig
) -> Iterator[str]:
    """What is wrong with this rank's modules."""
    covered: set[nn.Parameter] = set()
    for name, module in _each(modules):
        covered.update(module.parameters())
        if not _is_trained(module):
            continue
        if not isinstance(module, DistributedDataParallel):
            yield (
                f"module {name!r} is a {type(module).__name__} with trainable parameters; wrap it "
                "in megatron.core.distributed.DistributedDataParallel, or freeze it"
            )
            continue
        ddp_config = module.ddp_config
        if ddp_config.use_distributed_optimizer != config.use_distributed_optimizer:
            yield (
                f"module {name!r} is wrapped with use_distributed_optimizer="
                f"{ddp_config.use_distributed_optimizer} and the optimizer's config says "
                f"{config.use_distributed_optimizer}; give both the same"
            )
        if ddp_config.num_distributed_optimizer_instances != 1:
            yield (
                f"module {name!r} has num_distributed_optimizer_instances="
                f"{ddp_config.num_distributed_optimizer_instances}; expected 1"
            )
        yield from _misscaled(models[0], name, module)
        if not all(parameter.requires_grad for parameter in module.params_with_grad):
            yield f"module {name!r} was frozen in part after it was wrapped; freeze, then wrap"
    for full_name, parameter in (pair for model in models for pair in model.named_parameters()):
        if parameter.requires_grad and parameter not in covered:
            yield (
                f"parameter {full_name!r} belongs to no module and would not be trained; move it "
                "into the language model or a modality's submodules, or freeze it"
            )


def _misscaled(model: Any, name: str, module: Any) -> Iterator[str]:
    """Why a module's gradients would not be on the scale of the language model's."""
    grids = model.mimo_config.module_to_grid_map
    if not grids or module.config.calculate_per_token_loss:
        return
    own, other = (
        Geometry.of(one, grids[one]).sizes["dp"] for one in (name, MIMO_LANGUAGE_MODULE_KEY)
    )
    if own != other:
        yield (
            f"module {name!r} is wrapped with a configuration of calculate_per_token_loss=False, "
            f"which averages its gradients over {own} data-parallel ranks, and the language model "
            f"has {other}; set it to True in the configurations of all modules"
        )


def _gather(survey: _Survey) -> list[_Survey]:
    surveys = [survey]
    if dist.is_initialized():
        surveys *= dist.get_world_size()
        dist.all_gather_object(surveys, survey)
    return surveys


def _raise_problems(surveys: list[_Survey], keys: tuple[ParamKey, ...]) -> None:
    problems = {problem: None for survey in surveys for problem in survey.problems}
    if problems:
        raise ConfigError("no optimizer can be built:\n" + "\n".join(problems))
    for number, key in enumerate(keys):
        is_a_name = key.name and not (key.attr or key.predicate or key.with_name_predicate)
        if is_a_name and not any(survey.matched[number] for survey in surveys):
            raise ConfigError(
                f"config_overrides: no parameter is called {key.name!r}; names are those of the "
                "unwrapped model, such as 'language_model.*' and 'modality_submodules.<modality>.*'"
            )


def _by_full_name(
    overrides: Overrides | None, names: Mapping[nn.Parameter, str]
) -> dict[ParamKey, ParamGroupOverride] | None:
    """The overrides, asked with a parameter's name in the whole model."""
    if overrides is None:
        return None

    def asks(key: ParamKey) -> ParamWithNamePredicate:
        def fits(parameter: nn.Parameter, _: str) -> bool:
            return bool(key.matches(parameter, names[parameter]))

        return ParamWithNamePredicate(name=repr(key), fn=fits)

    return {ParamKey(with_name_predicate=asks(key)): value for key, value in overrides.items()}


def _nothing(
    config: Any, ddp_config: DistributedDataParallelConfig, pg_collection: Any
) -> DistributedDataParallel:
    """A wrapper without parameters; it asks for groups of stages and experts, and uses none."""
    groups = copy(pg_collection)
    if groups is not None:
        groups.ep = getattr(groups, "ep", None) or groups.tp
        groups.pp = getattr(groups, "pp", None) or groups.tp
    return DistributedDataParallel(config, ddp_config, nn.Module(), pg_collection=groups)
