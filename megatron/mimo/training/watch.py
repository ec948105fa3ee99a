"""Watches Megatron's training loop.

``pretrain`` has no callbacks. Therefore the functions that it calls once per iteration, evaluation
and checkpoint are replaced during a run by wrappers that call them and report; what they compute
stays the same.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.backend import hooks
from megatron.mimo.backend.patching import replaced
from megatron.mimo.checkpoints.folders import prune
from megatron.mimo.checkpoints.hashed_saving import hash_checkpoint, hashed_by_writers
from megatron.mimo.checkpoints.tracker import iteration_name
from megatron.mimo.data.micro_batches.batch import batch_device
from megatron.mimo.process import presence
from megatron.mimo.process.children import left_to_parent
from megatron.mimo.process.console import Console, Pace, format_progress
from megatron.mimo.process.ranks import running_job
from megatron.mimo.training.curve import LossCurve
from megatron.mimo.training.forward_step import LOSS, OF_SOURCE
from megatron.mimo.training.mismatch import explain
from megatron.mimo.training.module_ranks import from_last_stage, has_others
from megatron.mimo.training.plans import DataPosition
from megatron.mimo.training.saving import atomic_tracker, clear_place, save_error
from megatron.mimo.training.start_clock import StartClock
from megatron.mimo.training.throughput import Throughput, ThroughputMeter, write_scalars

__all__ = ["LoopWatch"]


class LoopWatch:
    """The state of the training loop: ``iteration``, ``saved`` and the speed."""

    def __init__(
        self,
        args: Namespace,
        console: Console,
        curve: LossCurve,
        meter: ThroughputMeter,
        position: DataPosition,
        clock: StartClock | None = None,
    ) -> None:
        self.iteration = 0
        self.saved: int | None = None
        self.pace = Pace()
        self.throughput: Throughput | None = None
        self._meter = meter
        self._args = args
        self._console = console
        self._curve = curve
        self._position = position
        self.clock = clock or StartClock(time.time())
        self._consumed = 0
        self._evaluated: tuple[int, str] = (-1, "")
        self._slot = presence.here().slot

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch every ``pretrain`` within this context."""
        with replaced(
            {
                hooks.TRAIN: self._around_train,
                hooks.TRAINING_LOG: self._around_log,
                hooks.EVALUATION: self._around_evaluation,
                hooks.EVALUATE: self._around_evaluate,
                hooks.SAVE: self._around_save,
                hooks.LOAD: self._around_load,
            }
        ):
            yield

    def _around_train(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.clock.reach("optimizer, checkpoint and data")
            self.pace.start()
            self._slot.begin(self.iteration + 1)
            self._consumed = self._trained()
            result = train(*args, **kwargs)
            if result[0] > self.iteration:  # --iterations-to-skip names the last one
                self.iteration = result[0]
                if self._args.save and self.saved != self.iteration:
                    _save_last(result, *args)
            return result

        return watched

    def _around_log(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            loss_dict: dict[str, torch.Tensor],
            total_loss_dict: dict[str, torch.Tensor],
            learning_rate: float | None,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            of_sources = _taken_out(loss_dict)
            result = training_log(
                loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs
            )
            loss = self._loss_everywhere(loss_dict.get(LOSS))
            self.iteration = iteration
            self.pace.step(self._trained() - self._consumed)
            self._meter.step()
            self._consumed = self._trained()
            self._curve.append(iteration, math.nan if loss is None else loss)
            self._slot.begin(iteration + 1)
            started = self.clock.first_iteration()
            if started is not None and self._args.verbose:
                self._console.say(started)
            self._show(loss, learning_rate)
            _show_sources(self._args, iteration, of_sources, self._console)
            return result

        return watched

    def _around_evaluation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(prefix: str, *args: Any, **kwargs: Any) -> Any:
            if (self.iteration, self._split(prefix)) == self._evaluated:
                return None  # same weights, same samples: pretrain evaluates once more at its end
            self._evaluated = (self.iteration, self._split(prefix))
            self.pace.pause()
            self._slot.begin(self.iteration)
            self._slot.enter("evaluating")
            result = function(prefix, *args, **kwargs)
            self._slot.begin(self.iteration + 1)
            self.pace.resume()
            return result

        return watched

    def _around_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            found = result[0] or {}
            figures = from_last_stage(
                self._args, {name: float(value) for name, value in found.items()}
            )
            if figures:
                split = self._evaluated[1]
                text = "  ".join(
                    f"{'loss' if name == LOSS else name} {value:.4f}"
                    for name, value in figures.items()
                )
                self._console.say(f"iteration {self.iteration}  {split}: {text}")
            return result

        return watched

    def _around_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def watched(iteration: int, *args: Any, **kwargs: Any) -> Any:
            folder = Path(self._args.save)
            if iteration == self.saved and not kwargs.get("non_persistent_ckpt"):
                return None  # it is there already, and writing over it would put it at risk
            self.pace.pause()
            self._slot.begin(iteration)
            self._slot.enter("saving")
            self._curve.sync()
            try:
                clear_place(folder, iteration)
                hashes = self._args.checkpoint_hashes
                if self._args.async_save:
                    with left_to_parent(), hashed_by_writers() if hashes else nullcontext():
                        result = save(iteration, *args, **kwargs)
                        self._position.save(folder / iteration_name(iteration))
                else:
                    with atomic_tracker(folder):
                        result = save(iteration, *args, **kwargs)
                        self._position.save(folder / iteration_name(iteration))
                        if hashes:
                            hash_checkpoint(folder / iteration_name(iteration), running_job())
            except BaseException as error:
                raise save_error(folder, iteration, self.saved, error) from error
            if not kwargs.get("non_persistent_ckpt"):
                self.saved = iteration
                if dist.get_rank() == 0:
                    prune(
                        folder,
                        keep=self._args.keep_checkpoints,
                        retain_interval=self._args.save_retain_interval,
                    )
            self._slot.begin(iteration + 1)
            self.pace.resume()
            return result

        return watched

    def _around_load(self, load: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.core.utils import unwrap_model

        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._slot.enter("loading a checkpoint")
            try:
                iteration, flops = load(model, *args, **kwargs)
            except MimoError:
                raise
            except BaseException as error:
                raise ConfigError(
                    f"the checkpoint in {self._args.load} cannot be loaded: "
                    + explain(error, unwrap_model(model), self._args.checkpoint)
                ) from error
            self._slot.enter("preparing the data")
            self.iteration = iteration
            if iteration and self._args.load == self._args.save:
                self.saved = iteration
            self._curve.begin(iteration)
            return iteration, flops

        return watched

    @staticmethod
    def _split(prefix: str) -> str:
        return "test" if "test set" in prefix else "validation"

    def _trained(self) -> int:
        """Samples that the model has learned from, without those of --iterations-to-skip."""
        args = self._args
        return int(args.consumed_train_samples - args.skipped_train_samples)

    def _loss_everywhere(self, loss: torch.Tensor | None) -> float | None:
        """The loss of the last pipeline stage on every stage; collective over the pipeline.

        None where the iteration had none: a step that fp16 skipped. A loss may be NaN.
        """
        from megatron.core import mpu

        if has_others(self._args):
            own = None if loss is None else float(loss)
            everywhere: float | None = from_last_stage(self._args, own)
            return everywhere
        group = mpu.get_pipeline_model_parallel_group()
        value = torch.zeros(2, dtype=torch.float64, device=batch_device())  # the loss, whether
        if loss is not None:
            value[0] = loss.detach().double().reshape(())
            value[1] = 1.0
        if group.size() > 1:
            dist.broadcast(value, group_src=group.size() - 1, group=group)
        number, there = value.tolist()
        return number if there else None

    def _show(self, loss: float | None, learning_rate: float | None) -> None:
        args, pace = self._args, self.pace
        total = args.train_iters
        extra = {} if learning_rate is None else {"lr": f"{learning_rate:.1e}"}
        milestone = self.iteration % args.log_interval == 0 or self.iteration == total
        if milestone or self.throughput is None:
            self.throughput = self._meter.read()
            write_scalars(self.throughput, pace.seconds_per_iteration, self.iteration)
        self._console.progress(
            format_progress(
                iteration=self.iteration,
                total=total,
                loss=loss,
                samples_per_second=pace.samples_per_second,
                figures=self.throughput.texts(pace.seconds_per_iteration),
                seconds_left=pace.seconds_per_iteration * (total - self.iteration),
                extra=extra,
            ),
            milestone=milestone,
        )
        if self.iteration == total:
            self._console.end_progress()


def _save_last(result: tuple[int, Any], *of_train: Any) -> None:
    """Save after a last iteration that was skipped: Megatron counts on the loop to have done it.

    Args:
        result: what Megatron's ``train`` has returned.
        of_train: what it was called with.
    """
    from megatron.training import training

    _, model, optimizer, scheduler, data = of_train[:5]
    training.save_checkpoint_and_time(
        result[0], model, optimizer, scheduler, result[1], of_train[8], train_data_iterator=data
    )


def _taken_out(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The losses of single sources, which leave what Megatron logs: one may have no tokens."""
    names = [name for name in losses if name.startswith(OF_SOURCE)]
    return {name.removeprefix(OF_SOURCE): losses.pop(name) for name in names}


def _show_sources(
    args: Namespace, iteration: int, losses: dict[str, torch.Tensor], console: Console
) -> None:
    """Log the losses of single sources of this iteration; collective over the pipeline.

    A source that gave no token is left out.
    """
    from megatron.training.global_vars import get_tensorboard_writer

    if not getattr(args, "data_mixture", None):
        return
    writer = get_tensorboard_writer()
    if writer is not None and iteration % args.tensorboard_log_interval == 0:
        for name, loss in losses.items():
            if math.isfinite(float(loss)):
                writer.add_scalar(f"{OF_SOURCE}{name}", float(loss), iteration)
    if iteration % args.log_interval == 0:
        figures = from_last_stage(args, {name: float(loss) for name, loss in losses.items()})
        shown = [f"{name} {value:.4f}" for name, value in figures.items() if math.isfinite(value)]
        console.say(f"iteration {iteration}  loss by source: {'  '.join(shown)}")
