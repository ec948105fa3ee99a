"""``--profile``: Megatron's own hook for torch's profiler, with named ranges and a summary.

Megatron makes the profiler, begins its steps and writes the trace. What is given to it here:

- a schedule in iterations of the run, where Megatron counts from the start of the process;
- ranges named by part: data, encode MODALITY, merge, layers, loss, backward, gradients, optimizer;
- where the host waits for the device, by place in the code, looked for in the iteration before;
- a page of text beside the trace (:mod:`megatron.mimo.training.profile_summary`).
"""

from __future__ import annotations

import os
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerAction, record_function

from megatron.mimo import data
from megatron.mimo.backend import hooks
from megatron.mimo.backend.host_sync import HostSyncCounter
from megatron.mimo.backend.patching import replace_in, replaced
from megatron.mimo.process.console import Console
from megatron.mimo.training.profile_summary import Event, is_part, summarize

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Profiling"]


class Profiling:
    """Profiles the iterations that ``--profile-step-start`` and ``--profile-step-end`` name.

    Args:
        args: of the run.
        chunks: of this rank's model; there by the time training begins.
        console: is told what was found.
    """

    def __init__(self, args: Namespace, chunks: Sequence[MimoModel], console: Console) -> None:
        self._args, self._chunks, self._console = args, chunks, console
        self._before = 0  # iterations that are done when training begins
        self._profiler: Any = None
        self._places: Counter[str] | None = None
        self._watched: AbstractContextManager[Counter[str]] | None = None
        self._since: _Clocks | None = None  # when the step that is recorded began
        self._spent = _Clocks(0.0, 0.0)  # in steps that were recorded

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Profile every ``pretrain`` within this context, where this rank is to be profiled."""
        args = self._args
        if not (args.profile and args.use_pytorch_profiler and args.rank in args.profile_ranks):
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it speaks of itself on every start
        with replaced(
            {
                hooks.TRAIN: self._around_train,
                hooks.PROFILER: lambda stock: partial(self._made, stock),
                hooks.BACKWARD: partial(_ranged, "backward"),
                hooks.FINALIZE: partial(_ranged, "gradients"),
            }
        ):
            yield

    def _around_train(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def profiled(
            forward_step: Any, model: Any, optimizer: Any, *given: Any, **named: Any
        ) -> Any:
            self._before = self._args.iteration
            for chunk in self._chunks:
                _name_parts(chunk)
            replace_in(optimizer, hooks.STEP, partial(_ranged, "optimizer"))
            first, last = self._steps
            if last < first or last <= self._before:
                self._console.say(
                    f"warning: nothing is profiled: --profile-step-start is {first}, and this run "
                    f"has the iterations {self._before + 1} to {self._args.train_iters}"
                )
            try:
                return train(forward_step, model, optimizer, *given, **named)
            finally:
                self._end()

        return profiled

    @property
    def _steps(self) -> tuple[int, int]:
        """The first iteration that is recorded, and the last."""
        args = self._args
        return args.profile_step_start, min(args.profile_step_end - 1, args.train_iters)

    def _made(self, stock: Any, **given: Any) -> Any:
        """The profiler, given what Megatron gives it, but for schedule and end."""
        profiling = self

        class Profiler(stock):
            """torch's, which says when a step begins."""

            def step(self) -> None:
                profiling._between()
                super().step()
                profiling._begun(self.current_action)

        write = given["on_trace_ready"]
        given |= {"schedule": self._action, "on_trace_ready": partial(self._written, write)}
        self._profiler = Profiler(**given)
        return self._profiler

    def _action(self, step: int) -> ProfilerAction:
        """What is done in the iteration that is the ``step``-th of this process, from 1."""
        iteration, (first, last) = self._before + step, self._steps
        if iteration == last and step:
            return ProfilerAction.RECORD_AND_SAVE
        if first <= iteration < last and step:
            return ProfilerAction.RECORD
        begins = iteration == first - 1 or (not step and first <= iteration < last)
        return ProfilerAction.WARMUP if begins else ProfilerAction.NONE

    def _between(self) -> None:
        """An iteration has ended, if there was one."""
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
            self._watched = None
        if self._since is not None:
            now, since, spent = _Clocks.now(), self._since, self._spent
            self._spent = _Clocks(*(n - b + a for n, b, a in zip(now, since, spent, strict=True)))
            self._since = None

    def _begun(self, action: ProfilerAction) -> None:
        """An iteration begins."""
        if action is ProfilerAction.WARMUP:
            self._watched = _places_of_waits(self._chunks)
            self._places = self._watched.__enter__()
        elif action in _RECORDS:
            self._since = _Clocks.now()

    def _end(self) -> None:
        """Training has ended, perhaps in the middle of what was to be recorded."""
        self._between()
        if self._profiler is not None and self._profiler.current_action in _RECORDS:
            self._profiler.stop()

    def _written(self, write: Callable[[Any], None], profiler: Any) -> None:
        """Let Megatron write the trace, and write what it says beside it."""
        write(profiler)
        args = self._args
        folder = Path(args.tensorboard_dir, "..", "torch_profile").resolve()
        summary = summarize(map(_event, profiler.profiler.kineto_results.events()))
        if summary is None:
            return
        threads = torch.get_num_threads()
        share = 100 * self._spent.processor / max(self._spent.wall, 1e-9) / threads
        first = max(self._steps[0], self._before + 1)
        span = f"iteration {first}" + f" to {first + summary.steps - 1}" * (summary.steps > 1)
        text = summary.text(
            title=f"profile of {span}, rank {args.rank}",
            places=self._places,
            processor=f"processor busy {share:.1f} % of the time of {threads} "
            f"thread{'s' * (threads > 1)}",
        )
        (folder / f"rank-{args.rank}.txt").write_text(text, encoding="utf-8")
        self._console.say(
            text + f"trace for https://ui.perfetto.dev: {folder}/rank-{args.rank}.json.gz"
        )


class _Clocks(NamedTuple):
    processor: float
    wall: float

    @classmethod
    def now(cls) -> _Clocks:
        return cls(time.process_time(), time.monotonic())


# What is read is made on the host, with a device too.
_DATA = str(Path(data.__file__).parent)
_RECORDS = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


def _ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function within a range of this name."""

    def within(*args: Any, **keywords: Any) -> Any:
        with record_function(name):
            return function(*args, **keywords)

    return within


def _name_parts(chunk: MimoModel) -> None:
    """Ranges for the language model's layers, and for its loss where it has one."""
    from megatron.core.utils import unwrap_model

    if chunk.language_model is None:  # on ranks of encoders alone
        return
    language = unwrap_model(chunk.language_model)
    decoder = getattr(language, "decoder", None)
    if decoder is None:
        return
    layers, loss = _Range("layers"), _Range("loss")
    decoder.register_forward_pre_hook(layers.begin)
    decoder.register_forward_hook(layers.end, always_call=True)
    if getattr(language, "post_process", False):
        decoder.register_forward_hook(loss.begin)
        language.register_forward_hook(loss.end, always_call=True)


class _Range:
    """A range from one hook of a module to another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[record_function] = []

    def begin(self, *_: Any) -> None:
        range_ = record_function(self._name)
        range_.__enter__()
        self._open.append(range_)

    def end(self, *_: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


@contextmanager
def _places_of_waits(chunks: Sequence[nn.Module]) -> Iterator[Counter[str]]:
    """Counts, by place in the code, what waits for the device; without one, what would."""
    places: Counter[str] = Counter()
    device = next(chunks[0].parameters()).device
    if device.type == "cpu":
        with _PlacedSyncs(places):
            yield places
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            places[_place(one.filename, one.lineno)] += 1
        elif "Synchronization debug mode" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


class _PlacedSyncs(HostSyncCounter):
    """Counts what would wait for a device by place, too."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, *given: Any, **named: Any) -> Any:
        before = self.total
        result = super().__torch_dispatch__(*given, **named)
        if self.total > before:
            frames = traceback.extract_stack()[:-1]
            outside = [one for one in frames if "/torch/" not in one.filename] or frames
            if not any(one.filename.startswith(_DATA) for one in outside):
                self._places[_place(outside[-1].filename, outside[-1].lineno)] += (
                    self.total - before
                )
        return result


def _place(file: str, line: int | None) -> str:
    """File and line, from the folder that packages lie in, or this one."""
    _, found, within = file.rpartition("site-packages/")
    return f"{within if found else os.path.relpath(file)}:{line}"


def _event(event: Any) -> Event:
    """One of the profiler's events."""
    on_device = event.device_type() != DeviceType.CPU
    return Event(
        name=event.name(),
        start=event.start_ns(),
        end=event.start_ns() + event.duration_ns(),
        thread=event.start_thread_id(),
        on_device=on_device,
        is_range=event.is_user_annotation() or is_part(event.name()),
        correlation=event.correlation_id(),
    )
