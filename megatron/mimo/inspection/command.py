"""The command ``python -m megatron.mimo.data inspect``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError, InputError, MimoError
from megatron.mimo.checkpoints.assets import end_tokens, read_processor
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.chat.chat import Chat
from megatron.mimo.data.reading.sample_reader import SampleReader
from megatron.mimo.data.sources import default_index_folder, files_of, open_file
from megatron.mimo.data.sources.record_file import RecordFile
from megatron.mimo.inspection.page import page
from megatron.mimo.inspection.seen import Seen, look
from megatron.mimo.inspection.statistics import Statistics
from megatron.mimo.inspection.terminal import sample_text, statistics_text
from megatron.mimo.models import family_of, read_hf_config
from megatron.mimo.process.quiet import quiet_imports, warnings_shown
from megatron.mimo.recipes.media_flags import (
    add_media_arguments,
    kept_video_fps,
    media_limits,
)
from megatron.mimo.recipes.reading_flags import (
    add_policy_arguments,
    add_reading_arguments,
    bad_sample_policy,
    reading_options,
)

__all__ = ["main"]

_REFUSED = 2
_ANY_LENGTH = sys.maxsize
_SIDE = 160  # pixels of thumbnails


def main(argv: Sequence[str] | None = None) -> int:
    """Show samples as training reads them.

    Args:
        argv: without the program's name; None for the process's own.

    Returns:
        The exit code: 1 where records were refused, 2 where the arguments are at fault.
    """
    given = _parser().parse_args(argv)
    try:
        with warnings_shown(shown=False), quiet_imports():
            reader = _reader(given)
            files = [open_file(one, default_index_folder()) for one in files_of(given.files)]
            refused = _show(given, reader, files)
    except (MimoError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return _REFUSED
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron.mimo.data")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show samples as training reads them",
        description="Reads records as training does and shows text, labels, media, what is "
        "refused and why, and statistics of lengths and media.",
    )
    inspect.add_argument("files", nargs="+", metavar="FILES", help="as --data-path takes them")
    inspect.add_argument(
        "--hf",
        required=True,
        metavar="DIR",
        help="Hugging Face directory with the model's processor and config.json, or a "
        "checkpoint's folder hf",
    )
    inspect.add_argument(
        "-n", type=int, default=5, metavar="N", help="samples that are shown (default: %(default)s)"
    )
    inspect.add_argument("--first", type=int, default=1, metavar="N", help="record to begin with")
    inspect.add_argument(
        "--statistics",
        type=int,
        default=200,
        metavar="N",
        help="records that are counted, evenly spread over all (default: %(default)s)",
    )
    inspect.add_argument("--html", metavar="OUT", help="write one page of HTML")
    inspect.add_argument("--tokens", action="store_true", help="list all tokens of the samples")
    inspect.add_argument(
        "--colour", choices=["auto", "yes", "no"], default="auto", help="default: on terminals"
    )
    inspect.add_argument("--seq-length", type=int, metavar="N", help="default: any length fits")
    add_reading_arguments(inspect)
    add_policy_arguments(inspect)
    add_media_arguments(inspect, video_fps=None)
    return parser


def _reader(given: argparse.Namespace) -> SampleReader:
    """The reader of training, which says what it would refuse."""
    folder = Path(given.hf)
    if not folder.is_dir():
        raise ConfigError(f"--hf {folder}: there is no such folder; correct the path")
    for name in ("n", "statistics"):
        if getattr(given, name) < 0:
            raise ConfigError(f"-{name} is {getattr(given, name)}; expected at least 0")
    if given.first < 1 or (given.seq_length is not None and given.seq_length < 1):
        raise ConfigError("--first and --seq-length count from 1; give larger ones")
    config = read_hf_config(folder)
    limits = media_limits(given)
    chat = Chat(
        family=family_of(config),
        config=config,
        processor=read_processor(folder),
        video_fps=given.video_fps or kept_video_fps(folder),
        end_tokens=end_tokens(folder),
        limits=limits,
    )
    policy = bad_sample_policy(given)
    too_long = "skip" if policy.on_too_long == "stop" else policy.on_too_long
    return SampleReader(
        chat=chat,
        seq_length=given.seq_length or _ANY_LENGTH,
        options=reading_options(given, chat),
        policy=replace(policy, on_bad_sample="skip", on_too_long=too_long),
    )


def _show(given: argparse.Namespace, reader: SampleReader, files: Sequence[RecordFile]) -> int:
    """Write text and page; the number of records that were refused."""
    total = sum(map(len, files))
    if not total:
        raise ConfigError(f"{', '.join(given.files)}: no records; expected at least one")
    if given.first > total:
        raise ConfigError(f"--first {given.first}: there are {total} records; give fewer")
    colour = given.colour == "yes" or (given.colour == "auto" and sys.stdout.isatty())
    shown = range(given.first - 1, min(given.first - 1 + given.n, total))
    counted = min(given.statistics, total)
    spread = {number * total // counted for number in range(counted)}
    statistics, samples = Statistics(), list[Seen]()
    for number in [*shown, *sorted(spread - set(shown))]:
        seen = _seen(files, number, reader, side=_SIDE if number in shown else 0)
        statistics.add(seen)
        if number in shown:
            samples.append(seen)
            _say(sample_text(seen, colour=colour, tokens=given.tokens) + "\n")
    _say(statistics_text(statistics))
    if given.html:
        title = f"Data of {', '.join(Path(one).name for one in given.files)}"
        Path(given.html).write_text(page(samples, statistics, title), encoding="utf-8")
        _say(f"page: {given.html}")
    return statistics.refusals.total()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _seen(files: Sequence[RecordFile], number: int, reader: SampleReader, *, side: int) -> Seen:
    file, place = next(_places(files, number))
    try:
        record = file[place]
    except InputError as error:  # a line that is no JSON, say
        where = f"record {place + 1}"
        bad = BadSample(
            file=str(file.path), place=where, medium=None, kind="bad", reason=str(error)
        )
        return Seen(name=f"{file.path}, {where}", refusal=bad)
    return look(record, reader, side=side)


def _places(files: Sequence[RecordFile], number: int) -> Iterator[tuple[RecordFile, int]]:
    for file in files:
        if number < len(file):
            yield file, number
        number -= len(file)
        if number < 0:
            return
