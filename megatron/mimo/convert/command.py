"""The command line of ``python -m megatron.mimo.convert``."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.mimo.process.importing import importing_megatron
from megatron.mimo.process.quiet import quiet_imports, stdout, warnings_shown

__all__ = ["main"]

_DIFFERENT, _REFUSED, _STOPPED = 1, 2, 130
_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DESCRIPTION = """\
Hugging Face directories to checkpoints of any parallel layout, and back, bit for bit.

  import  meta/llava-7b  checkpoints/llava      start training with --load checkpoints/llava
  import  --family llava --part language=vicuna-7b --part images=clip-large  checkpoints/llava
                                                the same, of separate models
  export  runs/llava/checkpoints  my-llava      loads in transformers
  verify  meta/llava-7b  checkpoints/llava      keys, shapes, dtypes, logits, gradients
  verify  --tiny llava                          the whole way there and back, on this machine

Exit codes: 0 done; 1 verify found a difference; 2 refused, with the reason and the remedy;
130 stopped by Ctrl-C or SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 done, 1 differences found by ``verify``, 2 refused, 130 stopped.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], tuple[str, int]] = given.run
    with importing_megatron():
        from megatron.core.models.mimo.errors import MimoError

    try:
        with _stoppable(), quiet_imports(), warnings_shown(shown=False), stdout(shown=False):
            _quiet_transformers()
            done, code = run(given)
    except MimoError as error:
        sys.stderr.write(f"error: {error}\n")
        return _REFUSED
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or ''}: {error.strerror or error}\n")
        return _REFUSED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was left behind\n")
        return _STOPPED
    if not getattr(given, "quiet", False):
        sys.stdout.write(f"{done}\n")
    return code


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is cleaning up
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron.mimo.convert",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_import(commands)
    _add_export(commands)
    _add_verify(commands)
    return parser


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="a Hugging Face directory -> a checkpoint",
        description="Write a checkpoint that a run of any layout starts from (--load CHECKPOINT). "
        "Configuration, processor and tokenizer go along into CHECKPOINT/hf. With --family the "
        "model is put together: a language model and encoders of your choice, and fresh "
        "projectors.",
        usage="%(prog)s [options] HF_DIR CHECKPOINT\n"
        "       %(prog)s [options] --family FAMILY --part NAME=HF_DIR ... CHECKPOINT",
    )
    parser.add_argument("source", metavar="HF_DIR", type=Path, help="with safetensors weights")
    parser.add_argument(
        "target", metavar="CHECKPOINT", type=Path, nargs="?", help="a new directory"
    )
    parser.add_argument("--family", help="of a model of parts: llava, llava_next, llava_avlm")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        type=_part,
        metavar="NAME=HF_DIR",
        help="language, images or audio",
    )
    _add_common(parser)
    parser.set_defaults(run=_import)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "export",
        help="a checkpoint -> a Hugging Face directory",
        description="Write a directory that transformers loads, from an imported or a trained "
        "checkpoint of any layout. Adapters are merged into the weights.",
    )
    parser.add_argument("source", metavar="CHECKPOINT", type=Path, help="what --save wrote")
    parser.add_argument("target", metavar="HF_DIR", type=Path, help="a new directory")
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the newest")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=_size("5GB"),
        metavar="SIZE",
        help="of a file, where the names of an import are not known (default 5GB)",
    )
    parser.add_argument(
        "--adapters-only", action="store_true", help="write the adapters in PEFT's format"
    )
    _add_hashes(parser)
    _add_common(parser)
    parser.set_defaults(run=_export)


def _add_hashes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-checkpoint-hashes",
        action="store_false",
        dest="hashes",
        help="do not compare the checkpoint's files with the hashes written with them",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights; default: as they are")
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="default: processors, at most 4"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="whether a checkpoint is the Hugging Face model",
        description="Compare keys, shapes, dtypes and values; then load both in fp32 and compare "
        "logits, the gradient of every parameter, and greedy answers, on random conversations.",
    )
    parser.add_argument("source", metavar="HF_DIR", type=Path, nargs="?")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, nargs="?")
    parser.add_argument(
        "--tiny", metavar="FAMILY", help="make a small random model, and take it there and back"
    )
    parser.add_argument("--list", action="store_true", help="the families")
    parser.add_argument("--tp", type=_count, default=1, metavar="N", help="tensor parallelism")
    parser.add_argument("--pp", type=_count, default=1, metavar="N", help="pipeline parallelism")
    parser.add_argument("--samples", type=_count, default=2, metavar="N", help="default 2")
    parser.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="layers of our model; default: those that training takes on this machine",
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="compare files; build neither model"
    )
    parser.add_argument("--logits", type=float, default=1e-4, metavar="X", help="allowed, absolute")
    parser.add_argument(
        "--gradients", type=float, default=1e-3, metavar="X", help="allowed, relative"
    )
    _add_hashes(parser)
    parser.set_defaults(run=_verify)


def _import(given: argparse.Namespace) -> tuple[str, int]:
    from megatron.core.models.mimo.errors import ConfigError

    # seconds of Megatron, which --help does without
    from megatron.mimo.convert.assembling import import_parts
    from megatron.mimo.convert.importing import import_model

    how: dict[str, Any] = {
        "dtype": _dtype(given.dtype),
        "threads": given.threads,
        "shown": not given.quiet,
    }
    parts = dict(given.part)
    if bool(parts) != (given.family is not None) or (parts and given.target is not None):
        raise ConfigError(
            "import takes HF_DIR and CHECKPOINT, or --family FAMILY, --part NAME=HF_DIR for each "
            "part, and CHECKPOINT; see --help"
        )
    if len(parts) < len(given.part):
        raise ConfigError("--part names a part twice; give each once")
    if parts:
        return import_parts(given.family, parts, given.source, **how), 0
    if given.target is None:
        raise ConfigError("import takes HF_DIR and CHECKPOINT; see --help")
    return import_model(given.source, given.target, **how), 0


def _export(given: argparse.Namespace) -> tuple[str, int]:
    from megatron.core.models.mimo.errors import ConfigError

    # seconds of Megatron, which --help does without
    from megatron.mimo.convert.exporting import export_model

    if given.adapters_only and given.dtype:
        raise ConfigError("--dtype has no effect on --adapters-only; leave it away")
    done = export_model(
        given.source,
        given.target,
        iteration=given.iteration,
        dtype=_dtype(given.dtype),
        max_shard_size=given.max_shard_size,
        adapters_only=given.adapters_only,
        hashes=given.hashes,
        threads=given.threads,
        shown=not given.quiet,
    )
    return done, 0


def _verify(given: argparse.Namespace) -> tuple[str, int]:
    from megatron.core.models.mimo.errors import ConfigError

    # seconds of Megatron, which --help does without
    from megatron.mimo.convert.verify import Allowed, verify_checkpoint, verify_tiny
    from megatron.mimo.models import family_names

    if given.list:
        return "\n".join(family_names()), 0
    named = [path for path in (given.source, given.checkpoint) if path is not None]
    if len(named) != (0 if given.tiny else 2):
        raise ConfigError("verify takes HF_DIR and CHECKPOINT, or --tiny FAMILY; see --help")
    if given.weights_only and given.transformer_impl:
        raise ConfigError("--transformer-impl has no effect on --weights-only; leave it away")
    changes = {"transformer_impl": given.transformer_impl} if given.transformer_impl else None
    if given.tiny:
        findings = verify_tiny(given.tiny, tp_size=given.tp, pp_size=given.pp, changes=changes)
    else:
        findings = verify_checkpoint(
            given.source,
            given.checkpoint,
            tp_size=given.tp,
            pp_size=given.pp,
            samples=given.samples,
            weights_only=given.weights_only,
            allowed=Allowed(logits=given.logits, gradients=given.gradients),
            changes=changes,
            hashes=given.hashes,
        )
    good = all(finding.equal for finding in findings)
    lines = [*map(str, findings), "equal" if good else "NOT equal"]
    return "\n".join(lines), 0 if good else _DIFFERENT


def _quiet_transformers() -> None:
    """Switch transformers' progress bars and advice off, if transformers is installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _part(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=HF_DIR, such as images=clip")
    return name, Path(folder)


def _size(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*(|KB|MB|GB)", text.upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1")
    return int(text)
