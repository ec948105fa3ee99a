"""Applies what the flags say about parts of the model, and says how much of it is trained.

A part is named as ``MimoModel.freeze`` takes it. Whether a name exists is asked of all ranks, since
each holds only its own stages.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.arguments.component_flags import components_of
from megatron.mimo.data.micro_batches.batch import batch_device
from megatron.mimo.lora import add_adapters, require_adapters, settings_from
from megatron.mimo.models.common.flops import shards_of
from megatron.mimo.training.frozen_layers import has_gaps

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Trained", "apply_parts", "survey_parts"]


def apply_parts(model: MimoModel, args: Namespace) -> list[str]:
    """Freeze and adapt one chunk of the model, before it is wrapped.

    Returns:
        Paths of the layers that got an adapter.
    """
    if args.freeze:
        model.freeze(*args.freeze)
    settings = settings_from(args)
    return add_adapters(model, settings, seed=args.seed) if settings is not None else []


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trained part of a model, over all ranks.

    Attributes:
        text: how much of the model it is, for a human.
        has_gaps: a stack has layers that are trained and layers that are not.
    """

    text: str
    has_gaps: bool


def survey_parts(chunks: Sequence[MimoModel], args: Namespace, adapters: list[str]) -> Trained:
    """Check the names against the whole model, and find what is trained. Collective.

    Every rank calls it, with all of its chunks.

    Args:
        chunks: what ``apply_parts`` was called with.
        args: the run's.
        adapters: what it returned, over all chunks.

    Raises:
        ConfigError: a name that no rank has, or nothing is trained.
    """
    from megatron.core.models.mimo.model.freezing import part_names, paths_by_parameter

    paths = [item for chunk in chunks for item in paths_by_parameter(chunk).items()]
    known = part_names(chunks[0].mimo_config)
    parts = _gather(paths, adapters)
    _check_names(args, known, parts)
    return Trained(
        text=_count_text(paths, args),
        has_gaps=has_gaps(parts.trained, parts.frozen),
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Paths of parameters, and of layers with an adapter."""

    frozen: frozenset[str]
    trained: frozenset[str]
    adapted: frozenset[str]


def _gather(paths: Sequence[tuple[nn.Parameter, tuple[str, ...]]], adapters: list[str]) -> _Parts:
    """The parts of all ranks; collective over the default group."""
    own = _Parts(
        frozen=frozenset(path for p, names in paths for path in names if not p.requires_grad),
        trained=frozenset(path for p, names in paths for path in names if p.requires_grad),
        adapted=frozenset(adapters),
    )
    everywhere = [own] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return _Parts(
        frozen=frozenset().union(*(parts.frozen for parts in everywhere)),
        trained=frozenset().union(*(parts.trained for parts in everywhere)),
        adapted=frozenset().union(*(parts.adapted for parts in everywhere)),
    )


def _check_names(args: Namespace, known: list[str], parts: _Parts) -> None:
    from megatron.core.models.mimo.model.freezing import no_such_part, selects

    everything = parts.frozen | parts.trained
    for name in args.freeze:
        if name not in known and not any(selects(name, path) for path in everything):
            raise no_such_part("--freeze", name, known, everything)
    for flag, rates in (("--module-lr", args.module_lr), ("--module-wd", args.module_wd)):
        for name, _ in rates:
            if any(selects(name, path) for path in parts.trained):
                continue
            if any(selects(name, path) for path in parts.frozen):
                raise ConfigError(f"{flag} {name}: all of it is frozen; leave it away")
            raise no_such_part(flag, name, known, everything)
    settings = settings_from(args)
    if settings is not None:
        require_adapters(settings, sorted(parts.adapted))


def _count_text(paths: Sequence[tuple[nn.Parameter, tuple[str, ...]]], args: Namespace) -> str:
    counts = torch.zeros(2, dtype=torch.float64)
    components = components_of(args.component, world_size=args.world_size)
    for parameter, names in paths:
        if getattr(parameter, "shared", False):
            continue  # the last stage's copy of the embedding
        own = components.get(names[0].partition(".")[0]) if names else None
        pp, ranks, sizes = args.pipeline_model_parallel_size, dist.get_world_size(), args
        if own is not None:
            pp, ranks = own.pp, own.size
            sizes = Namespace(**{**vars(args), "tensor_model_parallel_size": own.tp})
        share = shards_of(parameter, sizes) * pp / ranks  # of its copies, which all ranks sum up
        counts += parameter.numel() * share * torch.tensor([float(parameter.requires_grad), 1.0])
    counts = counts.float().to(batch_device())
    dist.all_reduce(counts)
    trained, total = (counts / 1e6).tolist()
    if trained == 0:
        raise ConfigError(
            "nothing is trained: --freeze, or the recipe, leaves no parameter; name fewer parts"
        )
    return f"trains {_millions(trained)} of {_millions(total)} million parameters"


def _millions(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.2g}"
