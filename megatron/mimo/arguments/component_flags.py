"""The flags that give modules parallel layouts of their own: --component and what goes with it."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.topology import LANGUAGE, Component, check_components, draw, parse_component

__all__ = [
    "add_component_arguments",
    "components_of",
    "layout_text",
    "processes_of_language",
    "take_components",
]

_OF_LANGUAGE = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
}


def add_component_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags."""
    group.add_argument(
        "--component",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=AXIS=SIZE,...",
        help="a module's own parallel layout, such as images=tp=1,dp=8 and language=tp=2,pp=2,dp=2;"
        " give one for every module (axes: tp, cp, dp, pp; rank_offset for its first rank), or "
        "none: then all share the language model's",
    )
    group.add_argument(
        "--encoder-activations",
        choices=("keep", "recompute"),
        default="keep",
        help="with --component: hold the encoders' activations until the language model has run, "
        "or compute them again then",
    )
    group.add_argument(
        "--encode-ahead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --component: encoders that are frozen begin with the next step's media at the "
        "end of a step, and hold their rows meanwhile (default: on)",
    )
    group.add_argument(
        "--show-layout", action="store_true", help="draw which rank runs what, and exit"
    )


def components_of(texts: list[str], *, world_size: int) -> Mapping[str, Component]:
    """The components that a command line gives, by name; {} for none.

    Raises:
        ConfigError: they do not fit each other or the job.
    """
    if not texts:
        return {}
    return check_components([parse_component(text) for text in texts], world_size=world_size)


def require_components(components: Mapping[str, Component], modalities: Iterable[str]) -> None:
    """Raise ``ConfigError`` for components that are not the model's modules."""
    named, own = set(components), {*modalities, LANGUAGE}
    if named != own:
        raise ConfigError(
            f"--component is given for {sorted(named)}, and the model has the modules "
            f"{sorted(own)}; give one for each"
        )


def layout_text(args: Namespace) -> str:
    """What --show-layout prints."""
    components = components_of(args.component, world_size=args.world_size)
    if components:
        return draw(components)
    language = Component(
        name=LANGUAGE,
        tp=args.tensor_model_parallel_size,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        pp=args.pipeline_model_parallel_size,
    )
    where = "uniform: encoders run on the first pipeline stage, in the language model's groups"
    return f"{draw({LANGUAGE: language})}\n\n{where}"


@contextmanager
def processes_of_language(args: Namespace) -> Iterator[None]:
    """Let checks and Megatron's arithmetic count the language model's processes alone.

    For modules on ranks of their own: the other ranks do not take part in the language model.
    """
    world_size = args.world_size
    components = components_of(args.component, world_size=world_size)
    if components:
        args.world_size = components[LANGUAGE].size
    try:
        yield
    finally:
        args.world_size = world_size


def take_components(args: Namespace) -> None:
    """Let Megatron know the language model's sizes from its component.

    Raises:
        ConfigError: components that do not fit, or that another flag contradicts.
    """
    components = components_of(args.component, world_size=args.world_size)
    if not components:
        if args.encoder_activations != "keep":
            raise ConfigError(
                f"--encoder-activations {args.encoder_activations} without --component, where "
                "encoders run within the schedule; leave it away, or use --recompute-granularity"
            )
        return
    language = components[LANGUAGE]
    for axis, name in _OF_LANGUAGE.items():
        own, given = getattr(language, axis), getattr(args, name)
        if given not in (1, own):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given} and --component {language}, which gives the language model {axis} "
                f"{own}; leave one of them away"
            )
    args.tensor_model_parallel_size = language.tp
    args.context_parallel_size = language.cp
    args.pipeline_model_parallel_size = language.pp
    if getattr(args, "cache_encoder", None):
        raise ConfigError(
            "--cache-encoder with --component: rows of a cache are read where the uniform layout "
            "encodes; leave one of them away"
        )
    if args.dist_ckpt_optim_fully_reshardable is False and args.use_distributed_optimizer:
        raise ConfigError(
            "--component with the distributed optimizer saves state that any layout loads; leave "
            "--no-dist-ckpt-optim-fully-reshardable away"
        )
