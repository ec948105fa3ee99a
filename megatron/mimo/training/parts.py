"""What the flags say about parts of the model, applied: --freeze, --lora, --module-lr, --module-wd.

A part is named as ``MimoModel.freeze`` takes it. Whether a name exists is asked of all ranks, since
each holds only its own stages.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Trained", "add_part_arguments", "apply_parts", "check_parts", "survey_parts"]

Rate = tuple[str, float]


def add_part_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that name parts of the model."""
    from megatron.mimo.lora import TARGETS

    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="NAME",
        help="parts that are not trained, such as language, images, images.projections, "
        "language.decoder.layers.0",
    )
    for flag, what in (("--module-lr", "learning rate"), ("--module-wd", "weight decay")):
        group.add_argument(
            flag,
            nargs="+",
            type=_rate,
            default=[],
            metavar="NAME=VALUE",
            help=f"{what} of parts, such as images.encoders=2e-6; the longest name wins",
        )
    group.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="NAME",
        help="parts that are trained by low-rank adapters, such as language or images.encoders; "
        "their own weights are frozen",
    )
    group.add_argument("--lora-rank", type=int, default=16, help="inner width of the adapters")
    group.add_argument(
        "--lora-alpha", type=float, default=32.0, help="scale of the adapters, times their rank"
    )
    group.add_argument(
        "--lora-dropout", type=float, default=0.0, help="dropout of the adapters' inputs"
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=list(TARGETS),
        metavar="LAYER",
        help=f"linear layers that get an adapter (default: {' '.join(TARGETS)})",
    )


def check_parts(args: Namespace) -> None:
    """Check what can be checked without a model.

    Raises:
        ConfigError: a name given twice, a value out of range, flags that exclude each other.
    """
    from megatron.mimo.lora import settings_from

    settings_from(args)
    for flag, rates, least in (
        ("--module-lr", args.module_lr, "larger than 0; --freeze keeps a part from training"),
        ("--module-wd", args.module_wd, "0 or larger"),
    ):
        names = [name for name, _ in rates]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"{flag}: {twice[0]!r} is given twice")
        for name, value in rates:
            if not 0 <= value < float("inf") or (value == 0 and rates is args.module_lr):
                raise ConfigError(f"{flag} {name}={value}: must be {least}")
    if args.module_lr and args.decoupled_lr is not None:
        raise ConfigError(
            "--module-lr and --decoupled-lr exclude each other; in place of the latter, give "
            "--module-lr language.embedding=... language.output_layer=..."
        )
    if args.module_lr and not args.lr:
        raise ConfigError("--module-lr needs --lr, whose schedule it scales")


def apply_parts(model: MimoModel, args: Namespace) -> list[str]:
    """Freeze and adapt one chunk of the model, before it is wrapped.

    Returns:
        Paths of the layers that got an adapter.
    """
    from megatron.mimo.lora import add_adapters, settings_from

    if args.freeze:
        model.freeze(*args.freeze)
    settings = settings_from(args)
    return add_adapters(model, settings, seed=args.seed) if settings is not None else []


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run trains, over all ranks.

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
    from megatron.core.models.mimo.model.freezing import parameter_paths, part_names
    from megatron.mimo.training.frozen_layers import has_gaps

    paths = [item for chunk in chunks for item in parameter_paths(chunk).items()]
    known = part_names(chunks[0].mimo_config.modality_submodules_spec)
    parts = _gather(paths, adapters)
    _check_names(args, known, parts)
    return Trained(
        text=_count_text([parameter for parameter, _ in paths], args),
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
    from megatron.mimo.lora import require_adapters, settings_from

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


def _count_text(parameters: Sequence[nn.Parameter], args: Namespace) -> str:
    from megatron.mimo.training.data import training_device

    counts = torch.zeros(2, dtype=torch.float64)
    tp = args.tensor_model_parallel_size
    for parameter in parameters:
        if getattr(parameter, "shared", False):
            continue  # the last stage's copy of the embedding
        share = 1.0 if getattr(parameter, "tensor_model_parallel", False) else 1.0 / tp
        if not getattr(parameter, "allreduce", True):  # an expert's
            share = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp) / tp
        counts += parameter.numel() * share * torch.tensor([float(parameter.requires_grad), 1.0])
    counts = counts.float().to(training_device())
    dist.all_reduce(counts)
    copies = dist.get_world_size() / (tp * args.pipeline_model_parallel_size)
    trained, total = (counts / copies / 1e6).tolist()
    if trained == 0:
        raise ConfigError(
            "nothing is trained: --freeze, or the recipe, leaves no parameter; name fewer parts"
        )
    return f"trains {_millions(trained)} of {_millions(total)} million parameters"


def _millions(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.2g}"


def _rate(word: str) -> Rate:
    name, equals, value = word.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is no NAME=VALUE, such as images.encoders=2e-6"
        ) from None
