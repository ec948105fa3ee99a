"""One run from the command line to ``metrics.json``, through Megatron's own ``pretrain``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.recipes import load_recipe
from megatron.mimo.recipes.recipe import FinishedRun, Recipe
from megatron.mimo.training import failure
from megatron.mimo.training.arguments import (
    EarlyArguments,
    list_recipes,
    parse_arguments,
    parse_early,
)
from megatron.mimo.training.checkpoints import choose, write_text
from megatron.mimo.training.progress import Console, format_count, format_duration

__all__ = ["main"]

METRICS = "metrics.json"
_SECOND_INTERRUPT = 2.0  # seconds; a launcher repeats the terminal's Ctrl-C at once


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe: what ``examples/mimo/pretrain_mimo.py`` runs on every process.

    Args:
        argv: command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 when the run is finished, was finished before or was stopped by a signal
        after saving; 2 when the arguments are wrong. A run that fails ends the process with 1.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        early = parse_early(argv)
        if early.list_recipes:
            if rank == 0:
                print(list_recipes())
            return 0
        recipe = load_recipe(early.recipe)
        with _quiet_imports():
            args = _arguments(recipe, early, argv, rank)
        start, warning = choose(args, repair=rank == 0)
    except MimoError as error:
        return failure.refuse(error, rank)
    console = Console(active=rank == 0)
    if warning:
        console.say(f"warning: {warning}")
    if _already_finished(args, start, console):
        return 0
    try:
        return _train(recipe, args, console)
    except (Exception, KeyboardInterrupt) as error:
        console.end_progress()
        _flush_writers()
        failure.end_run(error, rank)


def _arguments(
    recipe: Recipe, early: EarlyArguments, argv: Sequence[str] | None, rank: int
) -> Namespace:
    """Select the backend and parse; Megatron is imported here."""
    from megatron.mimo.backend import cpu, select_backend
    from megatron.mimo.layers import adam

    backend = select_backend()
    adam.install()
    if backend == "cpu":
        defaults: dict[str, object] = {**cpu.ARGUMENT_DEFAULTS, "num_workers": 0}
    else:
        defaults = {} if _has_transformer_engine() else {"transformer_impl": "local"}
    shown = "--verbose" in (sys.argv[1:] if argv is None else argv)
    wants_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    _single_process_environment()
    with _stdout(shown=(shown or bool(wants_help)) and rank == 0):
        return parse_arguments(
            recipe, backend=backend, backend_defaults=defaults, config=early.config, argv=argv
        )


def _train(recipe: Recipe, args: Namespace, console: Console) -> int:
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.training import pretrain

    from megatron.mimo.training.curve import LossCurve
    from megatron.mimo.training.data import dataset_provider
    from megatron.mimo.training.model import ModelBuilder
    from megatron.mimo.training.step import build_forward_step
    from megatron.mimo.training.watch import LoopWatch

    output = None if args.output is None else Path(args.output)
    curve = LossCurve(output / "loss.csv" if output else None, writes=args.rank == 0)
    watch = LoopWatch(args, console, curve)
    builder = ModelBuilder(recipe, args)
    console.say(_opening(recipe, args))
    with _stdout(shown=args.verbose and args.rank == 0), _warnings(shown=args.verbose):
        set_global_variables(args)
        stopped_by = _handle_interrupts(args, console)
        if args.load is None:
            curve.begin(0)
        try:
            with watch.installed():
                pretrain(
                    pretrain_cfg_container_from_args(args),
                    dataset_provider(recipe, args),
                    ModelType.encoder_or_decoder,
                    build_forward_step(recipe, args),
                    model_provider=builder,
                )
        except SystemExit as leaving:  # how pretrain ends early
            return _stopped(leaving, args, console, watch, stopped_by)
    console.end_progress()
    curve.close()
    if stopped_by:
        return 0
    _finish(recipe, args, console, watch, builder, curve, output)
    return 0


def _finish(
    recipe: Recipe,
    args: Namespace,
    console: Console,
    watch: Any,
    builder: Any,
    curve: Any,
    output: Path | None,
) -> None:
    """Evaluate and report; the checkpoint is on disk, so a signal may end this at any time."""
    import torch.distributed as dist

    from megatron.mimo.training.generate import GreedyGenerator

    _leave_on_signal(args, console)
    metrics: dict[str, Any] = {
        "recipe": recipe.name,
        "iteration": watch.iteration,
        "train_seconds": round(watch.pace.seconds, 3),
        "samples_per_second": round(watch.pace.samples / max(watch.pace.seconds, 1e-9), 2),
    }
    if recipe.finish is not None:
        console.say("evaluating ...")
        run = FinishedRun(
            arguments=args,
            model=builder.chunks,
            generate=GreedyGenerator(args, builder.chunks, recipe.build_collator(args)),
            train_seconds=watch.pace.seconds,
            samples_per_second=metrics["samples_per_second"],
            loss_curve=curve.points,
            output=output,
        )
        metrics |= recipe.finish(run)
    if output is not None and args.rank == 0:
        write_text(output / METRICS, json.dumps(metrics, indent=2) + "\n")
    console.say(_figures(metrics))
    if output is not None:
        console.say(f"run directory: {output}/")
    dist.barrier()
    dist.destroy_process_group()


def _already_finished(args: Namespace, start: int | None, console: Console) -> bool:
    """Say so when there is nothing left to train and the figures are written."""
    if start is None or args.train_iters is None or args.load != args.save or args.finetune:
        return False
    if start < args.train_iters or args.skip_train or args.ckpt_step:
        return False
    try:
        metrics = json.loads((Path(args.output) / METRICS).read_text())
    except (OSError, ValueError):
        return False  # training ended, evaluating did not
    if metrics.get("iteration") != start:
        return False
    console.say(
        f"already trained {start} iterations; pass --train-iters larger than {start} to continue, "
        "or another --output to start anew"
    )
    console.say(_figures(metrics))
    console.say(f"run directory: {args.output}/")
    return True


def _opening(recipe: Recipe, args: Namespace) -> str:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    dtype = str(args.params_dtype).removeprefix("torch.")
    where = "CPU, gloo" if args.distributed_backend == "gloo" else "CUDA, NCCL"
    return (
        f"recipe {recipe.name}: {args.world_size} process{'es' if args.world_size > 1 else ''} "
        f"({where}), tp {tp} pp {pp} dp {args.data_parallel_size}, {dtype}, "
        f"global batch {args.global_batch_size}, {args.train_iters} iterations"
    )


def _figures(metrics: dict[str, Any]) -> str:
    parts = []
    for name, value in metrics.items():
        if name == "train_seconds":
            parts.append(f"trained for {format_duration(value)}")
        elif name == "samples_per_second":
            parts.append(f"{format_count(value)} samples/s")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.4f}")
        elif isinstance(value, int):
            parts.append(f"{name} {value}")
    return "  ".join(parts)


def _stopped(
    leaving: SystemExit, args: Namespace, console: Console, watch: Any, stopped_by: list[str]
) -> int:
    console.end_progress()
    code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if code:
        console.say(
            f"stopped at iteration {watch.iteration}: a result did not pass Megatron's checks "
            f"(exit code {code}); --verbose shows which one"
        )
        return code
    by = f" by {stopped_by[0]}" if stopped_by else ""
    kept = "nothing is kept"
    if args.save:
        kept = f"checkpoint of iteration {watch.saved} in {args.save}; the same command continues"
    console.say(f"stopped at iteration {watch.iteration}{by}: {kept}")
    return 0


def _handle_interrupts(args: Namespace, console: Console) -> list[str]:
    """Let Ctrl-C do what SIGTERM does: save and exit after the current iteration.

    Returns:
        A list that gets the name of the signal which stopped the run.
    """
    received: list[str] = []
    if not args.exit_signal_handler:
        return received
    megatron_handler = signal.getsignal(args.exit_signal)
    first = [0.0]

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if not received:
            received.append(name)
            first[0] = now
            console.say(f"{name}: saving a checkpoint and leaving ...")
        elif number == signal.SIGINT and now - first[0] > _SECOND_INTERRUPT:
            os._exit(130)
        if callable(megatron_handler):
            megatron_handler(number, frame)

    signal.signal(args.exit_signal, handle)
    signal.signal(signal.SIGINT, handle)
    return received


def _leave_on_signal(args: Namespace, console: Console) -> None:
    def handle(number: int, _: FrameType | None) -> None:
        console.say(
            f"{signal.Signals(number).name}: training is complete and saved; the same command "
            "evaluates it"
        )
        os._exit(0)

    signal.signal(args.exit_signal, handle)
    signal.signal(signal.SIGINT, handle)


def _single_process_environment() -> None:
    """Without a launcher this process is a job of its own."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(single | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _flush_writers() -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None:
        with contextlib.suppress(Exception):
            writer.flush()


@contextlib.contextmanager
def _stdout(*, shown: bool) -> Iterator[None]:
    """What Megatron prints, on the screen or nowhere; ``Console`` keeps the real stream."""
    if shown:
        yield
        return
    with contextlib.redirect_stdout(_Nowhere()):
        yield


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Importing Megatron without Transformer Engine warns in a dozen places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _warnings(*, shown: bool) -> Iterator[None]:
    if shown:
        yield
        return
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.(core|training)\b")
        warnings.filterwarnings("ignore", module=r"torch\b")
        try:
            yield
        finally:
            logger.setLevel(level)
