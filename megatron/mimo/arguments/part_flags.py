"""The flags that name parts of the model: --freeze, --lora, --module-lr, --module-wd.

A part is named as ``MimoModel.freeze`` takes it.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.lora import TARGETS, settings_from

__all__ = ["Rate", "add_part_arguments", "check_parts"]

Rate = tuple[str, float]
"""The name of a part and its learning rate, or its weight decay."""


def add_part_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that name parts of the model."""
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
