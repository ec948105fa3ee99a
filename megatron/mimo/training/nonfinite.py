"""Finds where a value that is not finite comes from: iteration, micro-batch, samples, module.

Megatron checks losses and gradients before each update and, when one is rejected, computes the
iteration once more in place. Here that second time is watched, module by module. Megatron's own
verdict needs another GPU and a restart that computes the iteration again there, whatever the data
are by then; in its place the run ends with what was found, and nothing of it goes into checkpoints.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.backend.hooks import RERUN_MACHINE
from megatron.mimo.backend.patching import replaced
from megatron.mimo.training.culprit import Search
from megatron.mimo.training.origins import SampleFinder

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["NonFiniteError", "ResultWatch"]

_FAILED = 17  # Megatron's exit code of a run that ended by a result that failed validation


class NonFiniteError(MimoError, RuntimeError):
    """A loss or a gradient is not finite."""


class ResultWatch:
    """Follows Megatron's checks in a run; ``verdict`` says why it ended, if a check ended it."""

    def __init__(self, args: Namespace, chunks: Sequence[MimoModel], samples: SampleFinder) -> None:
        self.verdict: str | None = None
        self._args = args
        self._samples = samples
        self._search = Search(chunks)
        self._rejected: tuple[int, str] | None = None  # micro-batch, what; on this rank

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Follow every iteration within this context."""
        from megatron.core.rerun_state_machine import RerunStateMachine

        logger = logging.getLogger(RerunStateMachine.__module__)
        logger.addFilter(_is_true_here)
        try:
            with replaced({RERUN_MACHINE: self._watched}):
                yield
        finally:
            logger.removeFilter(_is_true_here)

    def _watched(self, stock: Any) -> Any:
        """Megatron's class of rerun state machines, with reports to this object."""
        watch = self

        class WatchedMachine(stock):
            """Megatron's, watched."""

            def should_run_forward_backward(self, *args: Any) -> bool:
                return watch._run(super().should_run_forward_backward, self, *args)

            def validate_result(self, result: Any, *args: Any, **keywords: Any) -> None:
                watch._validate(super().validate_result, self, result, *args, **keywords)

            def should_checkpoint_and_exit(self) -> tuple[bool, bool, int]:
                return watch._end(super().should_checkpoint_and_exit, self)

            def validate_state_dict(self, _: Any) -> bool:
                return False  # the state in a checkpoint is a fault of another time

        return WatchedMachine

    def _run(self, original: Callable[..., bool], machine: Any, *args: Any) -> bool:
        from megatron.core.rerun_state_machine import RerunMode, RerunState
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        # Megatron lets the first iteration of a process pass unchecked, because it could not write
        # a checkpoint then; an update by NaN is worse
        machine.first_iteration_complete = True
        if machine.state == RerunState.NOT_RUNNING_YET:
            machine.current_iteration = self._done - 1  # its messages would be one ahead
        runs = original(*args)
        self._search.end()
        if runs:
            again = machine.state == RerunState.RERUNNING_IN_PLACE
            self._search.begin(looks=again and machine.mode == RerunMode.VALIDATE_RESULTS)
            if again:  # what Megatron restored is what it will restore once more: keep it
                tracker = get_cuda_rng_tracker()
                tracker.set_states(tracker.get_states())
            else:
                self._rejected = None
        return runs

    def _validate(
        self, original: Callable[..., None], machine: Any, result: Any, *args: Any, **keywords: Any
    ) -> None:
        requested = machine.rerun_requested
        try:
            original(result, *args, **keywords)
        except RuntimeError as error:  # --rerun-mode disabled
            micro_batch, what = self._what(keywords.get("message", ""), result)
            raise NonFiniteError(
                f"{self._place(micro_batch)}: {what}; {self._samples.text(micro_batch)}; "
                "with --rerun-mode validate_results (the default) the module is found as well"
            ) from error
        if machine.rerun_requested and not requested:
            self._rejected = self._what(keywords.get("message", ""), result)

    def _end(self, original: Callable[..., Any], machine: Any) -> tuple[bool, bool, int]:
        from megatron.core.rerun_state_machine import RerunState

        answer: tuple[bool, bool, int] = original()
        if not answer[1]:
            return answer
        reproduced = machine.state == RerunState.WILL_RERUN_FROM_CHECKPOINT
        self.verdict = self._conclude(reproduced=reproduced)
        machine.state = RerunState.NOT_RUNNING_YET  # what is saved now is healthy
        machine.failed_validation_call = machine.initial_result = None
        machine.suspicious_node = machine.suspicious_device = None
        machine.rerun_requested = machine.checkpoint_requested = False
        return reproduced and self._done > 0 and bool(self._args.save), True, _FAILED

    @property
    def _done(self) -> int:
        """Iterations that are complete."""
        return int(self._args.curr_iteration)

    def _conclude(self, *, reproduced: bool) -> str:
        """The verdict; collective over all ranks."""
        own = None
        if self._rejected is not None:
            micro_batch, what = self._rejected
            finding = self._search.finding
            if finding is not None and finding.order[1]:  # of a gradient: when it was computed
                micro_batch = finding.order[0]
            own = micro_batch, what, self._samples.text(micro_batch)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (own, self._search.finding))
        micro_batch, what, samples = min(found for found, _ in everywhere if found is not None)
        findings = [finding for _, finding in everywhere if finding is not None]
        first = min(findings, key=lambda finding: finding.order, default=None)
        goes_on = "the same command goes on"
        if self._args.save and self._done:
            goes_on += f" from iteration {self._done}"
        if not reproduced:
            return (
                f"{self._place(micro_batch)}: {what}, but not when it was computed a "
                f"second time: the device computes unreliably, or not the same each time; {samples}"
                "; the same command goes on from the last checkpoint, best on another device"
            )
        cause = "" if first is None or samples.startswith(first.cause) else f"{first.cause}; "
        remedy = "lower --lr, or begin at an earlier checkpoint (--ckpt-step)"
        return (
            f"{self._place(micro_batch)}: {what}, and again when it was computed a second "
            f"time; {cause}{samples}; {remedy if first is None else first.remedy}; {goes_on}"
        )

    def _place(self, micro_batch: int) -> str:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        return (
            f"iteration {self._done + 1}, micro-batch {micro_batch + 1} of {get_num_microbatches()}"
        )

    def _what(self, message: str, result: Any) -> tuple[int, str]:
        value = float(result) if isinstance(result, Tensor) and result.numel() == 1 else result
        what = "a gradient" if "grad" in message else "the loss"
        return self._search.micro_batch, f"{what} is {value}"


def _is_true_here(record: logging.LogRecord) -> bool:
    return "Need to rerun on a different GPU" not in record.getMessage()
