"""Flags of where training data come from and in which order they are read."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.sources import (
    Mixture,
    MixtureSpec,
    SourceSpec,
    default_index_folder,
    read_mixture,
)
from megatron.mimo.data.sources.specification import ORDERS

__all__ = ["add_data_arguments", "check_data", "index_folder", "training_mixture"]

_COUNTS = ("shuffle_buffer", "pack_look_ahead")


def add_data_arguments(parser: ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group(title="sources of data")
    group.add_argument(
        "--data-mixture",
        metavar="FILE.yaml",
        help="several sources with weights, in place of --data-path (docs/sources.md shows one)",
    )
    group.add_argument(
        "--data-order",
        choices=ORDERS,
        default="auto",
        help="of --data-path: any record at any time (indexed), or files one after the other "
        "through a buffer (streaming); auto: streaming for tars, parquet and Energon",
    )
    group.add_argument(
        "--shuffle-buffer",
        type=int,
        default=1000,
        metavar="N",
        help="records that the next one of a streaming source is chosen among "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--pack-look-ahead",
        type=int,
        default=256,
        metavar="N",
        help="samples that the next one of a packed sequence is chosen among "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--measure-by-reading",
        action="store_true",
        help="read a sample for its length, where an image's size does not tell it",
    )
    group.add_argument(
        "--index-folder",
        metavar="DIR",
        help="where indexes of data files are kept (default: megatron-mimo/index in the user's "
        "cache folder)",
    )
    group.add_argument(
        "--cache-encoder",
        metavar="DIR",
        help="keep rows of frozen encoders here, and take those of media that were encoded before "
        "from here (in bfloat16)",
    )
    group.add_argument(
        "--restart-data",
        action="store_true",
        help="begin the data anew, whatever the checkpoint says of them",
    )


def check_data(args: Namespace) -> None:
    """Refuse numbers that make no sense, and two descriptions of the same data.

    Raises:
        ConfigError: there is one.
    """
    for name in _COUNTS:
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(args, name)}; expected at least 1")
    paths = args.train_data_path or args.data_path
    if args.data_mixture and paths:
        raise ConfigError(
            f"--data-mixture {args.data_mixture} and --data-path {' '.join(paths)}: both name what "
            "is trained on; give one"
        )


def training_mixture(args: Namespace) -> Mixture | None:
    """What is trained on; None where no flag names any.

    Raises:
        ConfigError: the mixture's file is malformed; there are no records.
        InputError: a file cannot be read.
    """
    paths = args.train_data_path or args.data_path
    if args.data_mixture:
        spec = read_mixture(Path(args.data_mixture))
    elif paths:
        one = SourceSpec(name="data", paths=paths, order=args.data_order)
        spec = MixtureSpec(sources=[one])
    else:
        return None
    return Mixture(
        spec, index_folder=index_folder(args), seed=args.seed, buffer=args.shuffle_buffer
    )


def index_folder(args: Namespace) -> Path:
    """Where indexes lie."""
    return Path(args.index_folder) if args.index_folder else default_index_folder()
