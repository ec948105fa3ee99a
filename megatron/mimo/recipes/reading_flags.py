"""How data is read and what is done with bad samples: flags of training and of ``inspect``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.bad_samples import BadSamplePolicy
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.formats import FORMATS, ReadingOptions
from megatron.mimo.data.media.boxes import BoxWriter

__all__ = ["add_policy_arguments", "add_reading_arguments", "bad_sample_policy", "reading_options"]


def add_reading_arguments(parser: ArgumentParser) -> None:
    """Add the flags that say what a record means."""
    group = parser.add_argument_group(title="records")
    group.add_argument(
        "--data-format",
        choices=[one.name for one in FORMATS],
        help="of all records (default: told from each record's keys)",
    )
    group.add_argument(
        "--ignore-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of records, turns and media that are read over (default: a key that is not "
        "honoured is an error)",
    )
    group.add_argument(
        "--media-folder",
        metavar="DIR",
        help="what paths of media in records are relative to (default: the folder of their file)",
    )
    group.add_argument(
        "--learn",
        choices=["all", "last"],
        default="all",
        help="turns of the assistant's that are learned (default: all, where no turn says "
        "otherwise)",
    )
    group.add_argument(
        "--boxes",
        choices=["model", "as-is"],
        default="model",
        help="boxes of objects are written in the units that the model has learned, or as they "
        "stand (default: %(default)s)",
    )
    group.add_argument(
        "--thinking",
        choices=["keep", "context", "drop"],
        default="keep",
        help="what stands in <think>: learned, context only, or left out (default: %(default)s)",
    )


def add_policy_arguments(parser: ArgumentParser) -> None:
    """Add the flags that say what is done with samples that cannot be trained on."""
    group = parser.add_argument_group(title="bad samples")
    group.add_argument(
        "--on-bad-sample",
        choices=["stop", "skip"],
        default="stop",
        help="a sample that cannot be read ends the run, or is left out and written to "
        "bad_samples.jsonl (default: %(default)s)",
    )
    group.add_argument(
        "--max-bad-samples",
        type=int,
        default=1000,
        metavar="N",
        help="more than these end the run all the same (default: %(default)s)",
    )
    group.add_argument(
        "--sample-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="that reading one sample may take; a decoder that takes longer is killed and the "
        "sample is bad (default: %(default)s; 0: no limit)",
    )
    group.add_argument(
        "--on-too-long",
        choices=["stop", "skip", "cut-front", "cut-end"],
        default="stop",
        help="what is longer than --seq-length ends the run, is left out, or loses whole turns "
        "from its front or its end; media are never cut (default: %(default)s)",
    )


def reading_options(args: Namespace, chat: Chat) -> ReadingOptions:
    """What the flags say, for the model of a chat.

    Raises:
        ConfigError: values that do not fit.
    """
    folder = None if args.media_folder is None else Path(args.media_folder)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--media-folder {folder}: there is no such folder; correct the path")
    return ReadingOptions(
        data_format=args.data_format,
        ignored=frozenset(args.ignore_keys),
        learn=args.learn,
        thinking=args.thinking,
        boxes=None if args.boxes == "as-is" else box_writer(chat),
        media_folder=folder,
    )


def box_writer(chat: Chat) -> BoxWriter:
    """Writes boxes as the chat's model reads them."""
    units = chat.family.box_units
    return BoxWriter(
        units=None if units is None else partial(units, chat.processor),
        family=chat.family.name,
        limits=chat.limits,
    )


def bad_sample_policy(args: Namespace) -> BadSamplePolicy:
    """What the flags say.

    Raises:
        ConfigError: values that do not fit.
    """
    return BadSamplePolicy(
        on_bad_sample=args.on_bad_sample,
        max_bad_samples=args.max_bad_samples,
        sample_timeout=args.sample_timeout or None,
        on_too_long=args.on_too_long,
    )
