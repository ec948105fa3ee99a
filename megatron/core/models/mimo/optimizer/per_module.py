"""Building the optimizers of a MimoModel's modules, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
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
) -> MimoOptimizer:
    """Build one Megatron optimizer per module and combine them.

    Every rank calls it together with the others; over the default process group they agree on
    what is built, so that all of them build or all of them raise.

    Args:
        mimo_model: a ``MimoModel`` whose language model and modality submodules are each wrapped
            in Megatron's ``DistributedDataParallel``; those without a trainable parameter need
            not be. Its ``pg_collection``, where a script has set one, gives the process groups.
        config: of all modules.
        config_overrides: as ``get_megatron_optimizer`` takes them: what differs for some
            parameters (learning rate, weight decay). Names are those of the unwrapped model,
            "modality_submodules.images.*". None for Megatron's usual ones; a dictionary takes
            their place.
        use_gloo_process_groups: as ``get_megatron_optimizer`` takes it.

    Raises:
        ConfigError: (a ``ValueError``) a module is not wrapped or wrapped for another kind of
            optimizer; an override for a name that no parameter has.
        UnsupportedError: (a ``RuntimeError``) an optimizer or option that works for single
            modules only.
    """
    _refuse(config)
    modules = _modules(mimo_model)
    names = _parameter_names(modules)
    keys = tuple(config_overrides or ())
    problems = tuple(_problems(mimo_model, modules, config))
    trained = {
        name: module
        for name, module in modules.items()
        if isinstance(module, DistributedDataParallel) and _is_trained(module)
    }
    surveys = _gather(
        _Survey(
            problems=problems,
            ddp_configs={name: module.ddp_config for name, module in trained.items()},
            matched=tuple(any(key.matches(*pair) for pair in names.items()) for key in keys),
        )
    )
    _raise_problems(surveys, keys)
    pg_collection = getattr(mimo_model, "pg_collection", None)
    infos = {}
    for name in modules:
        ddp_config = next((s.ddp_configs[name] for s in surveys if name in s.ddp_configs), None)
        optimizer = None
        if ddp_config is not None:
            # Optimizers align their parameter groups over the world: a rank without the module
            # takes part with one that holds nothing.
            chunk = trained.get(name)
            if chunk is None:
                chunk = _nothing(mimo_model.config, ddp_config, pg_collection)
            optimizer = get_megatron_optimizer(
                config,
                [chunk],
                config_overrides=_by_full_name(config_overrides, names),
                use_gloo_process_groups=use_gloo_process_groups,
                pg_collection=pg_collection,
            )
        infos[name] = ModuleOptimizerInfo(optimizer, None, pg_collection, name in trained)
    device = next((parameter.device for parameter in mimo_model.parameters()), None)
    return MimoOptimizer(infos, config, device=device)


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


def _modules(model: Any) -> dict[str, nn.Module | None]:
    """Every module of the model, in the same order on all ranks; None where it is not here."""
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
    modules: dict[str, nn.Module | None] = {
        name: dict(model.modality_submodules.items()).get(name)
        for name in model.mimo_config.modality_submodules_spec
    }
    modules[MIMO_LANGUAGE_MODULE_KEY] = model.language_model
    return modules


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def _parameter_names(modules: Mapping[str, nn.Module | None]) -> dict[nn.Parameter, str]:
    """Parameter -> its name in the unwrapped model."""
    names = {}
    for module_name, module in modules.items():
        if module is None:
            continue
        prefix = (
            "language_model"
            if module_name == MIMO_LANGUAGE_MODULE_KEY
            else f"modality_submodules.{module_name}"
        )
        for name, parameter in unwrap_model(module).named_parameters():
            names[parameter] = f"{prefix}.{name}"
    return names


def _problems(
    model: nn.Module, modules: Mapping[str, nn.Module | None], config: OptimizerConfig
) -> Iterator[str]:
    """What is wrong with this rank's modules."""
    covered: set[nn.Parameter] = set()
    for name, module in modules.items():
        covered.update(module.parameters() if module is not None else ())
        if module is None or not _is_trained(module):
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
        if not all(parameter.requires_grad for parameter in module.params_with_grad):
            yield f"module {name!r} was frozen in part after it was wrapped; freeze, then wrap"
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in covered:
            yield (
                f"parameter {full_name!r} belongs to no module and would not be trained; move it "
                "into the language model or a modality's submodules, or freeze it"
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
    return DistributedDataParallel(config, ddp_config, nn.Module(), pg_collection=pg_collection)
