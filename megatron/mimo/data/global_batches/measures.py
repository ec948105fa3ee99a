"""Ways to measure draws: in this process, in worker processes, shared by data-parallel ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.errors import InputError, MimoError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.global_batches.forming import Measures
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.sources import Draw
from megatron.mimo.process.children import left_to_parent, start_reading
from megatron.mimo.process.failure import EchoedError

__all__ = ["MeasuresHere", "MeasuresInWorkers", "SharedMeasures", "Unmeasured"]

Measured = Callable[[Draw], Measure | BadSample]

_CHUNK = 8  # draws that a worker is handed together


class MeasuresHere:
    """Measures draws in this process, when they are collected.

    Args:
        measure: of one draw.
    """

    def __init__(self, measure: Measured) -> None:
        self._measure = measure
        self._draws: list[Draw] = []

    def submit(self, draws: Sequence[Draw]) -> None:
        """Remember them."""
        self._draws += draws

    def collect(self) -> list[Measure | BadSample]:
        """Compute them."""
        draws, self._draws = self._draws, []
        return [self._measure(draw) for draw in draws]


class Unmeasured:
    """Measures nothing, where nothing depends on it: one rank, no packing, no sample left out."""

    def __init__(self) -> None:
        self._count = 0

    def submit(self, draws: Sequence[Draw]) -> None:
        """Count them."""
        self._count += len(draws)

    def collect(self) -> list[None]:
        """None for each draw."""
        count, self._count = self._count, 0
        return [None] * count


class MeasuresInWorkers:
    """Measures draws in worker processes, as soon as they are submitted.

    Args:
        measure: measures one draw; worker processes are forked, and so have it.
        workers: processes.
    """

    def __init__(self, measure: Measured, workers: int) -> None:
        self._measure = measure
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("fork"),
            initializer=partial(_begin, measure),
        )
        self._parts: list[Future[list[Measure | BadSample]]] = []

    def submit(self, draws: Sequence[Draw]) -> None:
        """Hand them to the processes."""
        with left_to_parent():  # the first ones start the processes
            for first in range(0, len(draws), _CHUNK):
                part = list(draws[first : first + _CHUNK])
                self._parts.append(self._pool.submit(_measured, part))

    def collect(self) -> list[Measure | BadSample]:
        """Wait for them."""
        parts, self._parts = self._parts, []
        try:
            return [one for part in parts for one in part.result()]
        except BrokenProcessPool as error:
            raise InputError(
                "a process that measures samples has ended, killed for its memory or by a fault "
                "of a decoder; give fewer --num-workers or more memory"
            ) from error


class SharedMeasures:
    """Each rank of a group measures its share, and all get all; collective in ``collect``.

    Every rank submits the same draws. An error of one is raised on all.

    Args:
        inner: measures this rank's share.
        group: data-parallel ranks; of a backend for host memory, and used for nothing else.
        late: bad samples that this rank has found while it read batches; after ``collect``, those
            that all have found since the last time.
    """

    def __init__(
        self, inner: Measures, group: dist.ProcessGroup, late: list[BadSample] | None = None
    ) -> None:
        self._inner = inner
        self._group = group
        self._late = [] if late is None else late
        self._count = 0

    def submit(self, draws: Sequence[Draw]) -> None:
        """Begin with this rank's share, every n-th."""
        rank, size = self._group.rank(), self._group.size()
        mine = [one for at, one in enumerate(draws, self._count) if at % size == rank]
        self._count += len(draws)
        self._inner.submit(mine)

    def collect(self) -> list[Measure | BadSample]:
        """The measures of all ranks' draws."""
        count, self._count = self._count, 0
        failure: Exception | None = None
        mine: Sequence[Any] | str
        try:
            mine = self._inner.collect()
        except Exception as error:  # noqa: BLE001 - the other ranks are waiting
            failure, mine = error, str(error)
        parts: list[Any] = [None] * self._group.size()
        dist.all_gather_object(parts, (mine, list(self._late)), group=self._group)
        if failure is not None:
            raise failure
        self._late[:] = [bad for _, late in parts for bad in late]
        parts = [part for part, _ in parts]
        for part in parts:
            if isinstance(part, str):
                raise EchoedError(f"a rank that measures samples failed: {part}")
        return [parts[at % len(parts)][at // len(parts)] for at in range(count)]


_process: dict[str, Measured] = {}  # what a worker process has been given


def _begin(measure: Measured) -> None:
    start_reading(0)
    _process["measure"] = measure


def _measured(draws: list[Draw]) -> list[Measure | BadSample]:
    try:
        return [_process["measure"](draw) for draw in draws]
    except MimoError as error:  # others than these may not survive the way back
        raise InputError(str(error)) from None
