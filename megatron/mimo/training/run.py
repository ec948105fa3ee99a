"""One run from the command line to ``metrics.json``, through Megatron's own ``pretrain``."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.arguments.command_line import parse_arguments
from megatron.mimo.arguments.component_flags import layout_text
from megatron.mimo.arguments.early import EarlyArguments, parse_early
from megatron.mimo.backend import capabilities
from megatron.mimo.backend.job import end_job
from megatron.mimo.checkpoints.folders import write_text
from megatron.mimo.process import failure, presence
from megatron.mimo.process.collector import uncollected
from megatron.mimo.process.console import Console, format_count, format_duration
from megatron.mimo.process.ownership import Ownership, claim_folders
from megatron.mimo.process.quiet import quiet_imports, stdout, warnings_shown
from megatron.mimo.process.signals import leave_on_signal, save_on_signal
from megatron.mimo.recipes import load_recipe, locate_recipe
from megatron.mimo.recipes.recipe import FinishedRun, Recipe
from megatron.mimo.training.start_clock import StartClock
from megatron.mimo.training.starting_point import choose_start

__all__ = ["main"]

METRICS = "metrics.json"
_ELSEWHERE = (
    "the same command in another layout, without --component say, evaluates this checkpoint"
)
_BACKENDS = {"nccl": "NCCL"}


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
        code = _main(argv, rank)
    except SystemExit as leaving:
        if not failure.unexpected_exit(leaving):
            presence.here().slot.done()  # --help
            raise
        failure.end_run(leaving, rank)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported, then the end
        failure.end_run(error, rank)
    if code == 0:
        presence.here().slot.done()
    return code


def _main(argv: Sequence[str] | None, rank: int) -> int:
    try:
        early = _early(argv)
        locate_recipe(early.recipe)
        with quiet_imports(), uncollected():
            recipe, args = _arguments(early, argv, rank)
        console = Console(active=rank == 0)
        if args.show_layout:
            console.say(layout_text(args))
            return 0
        owned = claim_folders(args, tell=console.say)
        _keep(owned)
        start, warning = choose_start(args, repair=rank == 0)
    except MimoError as error:
        return failure.refuse(error, rank)
    for text in (*args.read_over, *filter(None, [warning])):
        console.say(f"warning: {text}")
    try:
        code = 0
        if not _already_finished(args, start, console):
            code = _train(recipe, args, console)
            _end_together()
        for folder in owned:
            folder.release()
        return code
    except (Exception, KeyboardInterrupt):
        console.end_progress()
        _flush_writers()
        raise


def _keep(owned: Sequence[Ownership]) -> None:
    """Keep the ownership of the run's folders, and end the process if another run takes it."""

    def lost() -> None:
        failure.last_word("failed", "error: another run has taken over the output folder")
        os._exit(1)

    for folder in owned:
        presence.here().beat(partial(folder.beat, lost))


def _early(argv: Sequence[str] | None) -> EarlyArguments:
    """Parse the flags that are needed first; from here on this process is part of its job."""
    try:
        early = parse_early(argv)
    except MimoError:
        presence.join(stall_timeout=0)
        raise
    presence.join(stall_timeout=early.stall_timeout)
    return early


def _arguments(
    early: EarlyArguments, argv: Sequence[str] | None, rank: int
) -> tuple[Recipe, Namespace]:
    """Select the backend, load the recipe and parse; Megatron is imported here."""
    machine = capabilities()
    # once the backend is selected, as in _train
    from megatron.mimo.layers import install_adam

    install_adam()
    recipe = load_recipe(early.recipe)
    shown = "--verbose" in (sys.argv[1:] if argv is None else argv)
    wants_help = {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)
    importlib.import_module("megatron.training.training")  # the rest, while warnings are off
    with stdout(shown=(shown or bool(wants_help)) and rank == 0):
        args = parse_arguments(recipe, machine=machine, config=early.config, argv=argv)
    return recipe, args


def _train(recipe: Recipe, args: Namespace, console: Console) -> int:
    from megatron.core.enums import ModelType

    # What they import of Megatron looks for packages that the backend may have to hide first.
    from megatron.mimo.training.curve import LossCurve
    from megatron.mimo.training.data import dataset_provider
    from megatron.mimo.training.encoder_cache import EncoderCaches
    from megatron.mimo.training.forward_step import build_forward_step
    from megatron.mimo.training.model import ModelBuilder
    from megatron.mimo.training.nonfinite import ResultWatch
    from megatron.mimo.training.origins import SampleFinder
    from megatron.mimo.training.part_optimizer import part_optimizer
    from megatron.mimo.training.plans import DataPosition
    from megatron.mimo.training.profiling import Profiling
    from megatron.mimo.training.throughput import ThroughputMeter
    from megatron.mimo.training.watch import LoopWatch
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.training import pretrain

    output = None if args.output is None else Path(args.output)
    curve = LossCurve(output / "loss.csv" if output else None, writes=args.rank == 0)
    builder = ModelBuilder(recipe, args, console.say)
    meter, position = ThroughputMeter(builder.chunks), DataPosition(args)
    builder.grids.seen = meter.encoded
    watch = LoopWatch(args, console, curve, meter, position, StartClock.of_process())
    profiling = Profiling(args, builder.chunks, console)
    caches, samples = EncoderCaches(args, builder.chunks), SampleFinder()
    results = ResultWatch(args, builder.chunks, samples)
    _open(recipe, args, console)
    presence.here().slot.enter("building the model")
    with stdout(shown=args.verbose and args.rank == 0), warnings_shown(shown=args.verbose):
        set_global_variables(args)
        stopped_by = save_on_signal(args, console)
        if args.load is None:
            curve.begin(0)
        try:
            with contextlib.ExitStack() as stack:
                for one in (watch, profiling, results):
                    stack.enter_context(one.installed())
                stack.enter_context(part_optimizer(args, builder))
                pretrain(
                    pretrain_cfg_container_from_args(args),
                    dataset_provider(recipe, args, samples, position, caches, meter),
                    ModelType.encoder_or_decoder,
                    build_forward_step(recipe, args),
                    model_provider=watch.clock.around(builder),
                )
        except SystemExit as leaving:  # how pretrain ends early
            if results.verdict is not None:
                return _rejected(leaving, console, results.verdict, rank=args.rank)
            if failure.unexpected_exit(leaving):
                raise
            return _stopped(leaving, args, console, watch, stopped_by)
    _close(console, curve, caches)
    if not stopped_by:
        _finish(recipe, args, console, watch, builder, curve, output)
    return 0


def _close(console: Console, curve: Any, caches: Any) -> None:
    """Print how training has ended."""
    console.end_progress()
    curve.close()
    for said in caches.report():
        console.say(said)


def _open(recipe: Recipe, args: Namespace, console: Console) -> None:
    """Print what is run, and save what its checkpoints need beside the weights."""
    console.say(_opening(recipe, args))
    if recipe.save_assets is not None and args.save and args.rank == 0:
        recipe.save_assets(args, Path(args.save))


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
    # as in _train
    from megatron.mimo.training.generate import greedy_generation

    leave_on_signal(args, console)
    builder.grids.unwrap(builder.chunks)
    presence.here().slot.enter("evaluating and reporting")
    metrics: dict[str, Any] = {
        "recipe": recipe.name,
        "iteration": watch.iteration,
        "train_seconds": round(watch.pace.seconds, 3),
        "samples_per_second": round(watch.pace.samples / max(watch.pace.seconds, 1e-9), 2),
    }
    if watch.throughput is not None:
        metrics["throughput"] = watch.throughput.metrics(watch.pace.seconds_per_iteration)
    apart = builder.grids.modalities_across_replicas
    if recipe.finish is not None and apart:
        console.say(
            f"not evaluated by generation: the ranks of {', '.join(apart)} are not all on one "
            f"stage of one replica of the language model; {_ELSEWHERE}"
        )
        metrics |= {"evaluated": False, "components": args.component}
    elif recipe.finish is not None:
        console.say("evaluating ...")
        run = FinishedRun(
            arguments=args,
            model=builder.chunks,
            generate=greedy_generation(args, builder.chunks, recipe.build_collator(args)),
            train_seconds=watch.pace.seconds,
            samples_per_second=metrics["samples_per_second"],
            loss_curve=curve.points,
            output=output,
        )
        with warnings_shown(shown=args.verbose):
            metrics |= recipe.finish(run)
    if output is not None and args.rank == 0:
        write_text(output / METRICS, json.dumps(metrics, indent=2) + "\n")
    builder.grids.destroy()
    console.say(_figures(metrics))
    if output is not None:
        console.say(f"run directory: {output}/")


def _end_together() -> None:
    """Destroy the process groups of a run that all ranks leave together, finished or stopped.

    A rank that left earlier would break the connection of one that still waits for it.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    end_job()


def _already_finished(args: Namespace, start: int | None, console: Console) -> bool:
    """Say so when there is nothing left to train and the figures are written."""
    total = _iterations(args)
    if start is None or total is None or args.load != args.save or args.finetune:
        return False
    if start < total or args.skip_train or args.ckpt_step:
        return False
    if not (Path(args.output) / METRICS).is_file():
        return False  # training ended, evaluating did not
    try:
        metrics = json.loads((Path(args.output) / METRICS).read_text())
    except (OSError, ValueError):
        return False
    is_evaluated = metrics.get("evaluated", True)
    if metrics.get("iteration") != start:
        return False
    if not is_evaluated and metrics.get("components") != args.component:
        return False  # this layout may evaluate it
    console.say(
        f"already trained {start} iterations; pass {_longer(args, start)} to continue, or another "
        f"--output to start anew{'' if is_evaluated else f'; {_ELSEWHERE}'}"
    )
    console.say(_figures(metrics))
    console.say(f"run directory: {args.output}/")
    return True


def _iterations(args: Namespace) -> int | None:
    """The number of iterations of a run; None where it follows from a schedule of batch sizes."""
    if args.train_iters is not None or args.step_batch_size_schedule is not None:
        return args.train_iters
    return int(args.train_samples // args.global_batch_size)


def _longer(args: Namespace, start: int) -> str:
    if args.train_samples:
        return f"--train-samples larger than {args.train_samples}"
    return f"--train-iters larger than {start}"


def _length(args: Namespace) -> str:
    parts = [] if _iterations(args) is None else [f"{_iterations(args)} iterations"]
    return ", ".join(parts + ([f"{args.train_samples} samples"] if args.train_samples else []))


def _opening(recipe: Recipe, args: Namespace) -> str:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    dtype = str(args.params_dtype).removeprefix("torch.")
    stage = f", stage {args.stage}" if args.stage else ""
    where = f"{capabilities()}, {_BACKENDS.get(args.distributed_backend, args.distributed_backend)}"
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''}"
    return (
        f"recipe {recipe.name}{stage}: {processes} "
        f"({where}), tp {tp} pp {pp} dp {args.data_parallel_size}, {dtype}, "
        f"global batch {args.step_batch_size_schedule or args.global_batch_size}, {_length(args)}"
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


def _rejected(leaving: SystemExit, console: Console, verdict: str, *, rank: int) -> int:
    console.end_progress()
    failure.last_word("failed", f"error: {verdict}", prints=rank == 0)
    return int(leaving.code or 0)


def _stopped(
    leaving: SystemExit, args: Namespace, console: Console, watch: Any, stopped_by: list[str]
) -> int:
    console.end_progress()
    code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if code:
        text = (
            f"error: stopped at iteration {watch.iteration}: a result did not pass Megatron's "
            f"checks (exit code {code}); --verbose shows which one"
        )
        failure.last_word("failed", text, prints=args.rank == 0)
        return code
    by = f" by {stopped_by[0]}" if stopped_by else ""
    kept = "nothing is kept"
    if args.save and watch.saved is None:
        kept = f"no checkpoint was written to {args.save}"
    elif args.save:
        kept = f"checkpoint of iteration {watch.saved} in {args.save}; the same command continues"
    console.say(f"stopped at iteration {watch.iteration}{by}: {kept}")
    return 0


def _flush_writers() -> None:
    from megatron.training.global_vars import get_tensorboard_writer

    writer = get_tensorboard_writer()
    if writer is not None:
        with contextlib.suppress(Exception):
            writer.flush()
