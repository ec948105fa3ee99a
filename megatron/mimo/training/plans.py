"""A rank's share of global batches, which every rank plans alike, and the position of the data.

Each iteration's batch is formed first, then divided. The state behind it goes into the checkpoint
of that iteration, even if reading is further ahead by then.
"""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.errors import ConfigError, MimoError
from megatron.mimo.checkpoints.folders import write_text
from megatron.mimo.checkpoints.tracker import iteration_name
from megatron.mimo.data.bad_samples import BadSample, BadSampleLog
from megatron.mimo.data.global_batches.balance import divide
from megatron.mimo.data.global_batches.forming import GlobalBatch, GlobalBatches, Item, Measures
from megatron.mimo.data.global_batches.measures import (
    MeasuresHere,
    MeasuresInWorkers,
    SharedMeasures,
)
from megatron.mimo.data.measure import Measure
from megatron.mimo.data.sources import Draw
from megatron.mimo.training.module_ranks import data_writer

__all__ = ["DATA_FILE", "DataPosition", "RankPlan", "batch_sizes", "host_group", "measures_of"]

DATA_FILE = "data.json"  # in the folder of a checkpoint
_VERSION = 1


class DataPosition:
    """The position of the data at each iteration that is being computed or read ahead.

    Attributes:
        args: Megatron's, whose ``consumed_train_samples`` says which iteration is next.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._states: dict[int, dict[str, Any]] = {}

    def note(self, consumed: int, state: dict[str, Any]) -> None:
        """Remember the state behind the batch that ends with this sample; forget old ones."""
        self._states = {
            at: kept for at, kept in self._states.items() if at >= self.args.consumed_train_samples
        }
        self._states[consumed] = state

    def save(self, folder: Path) -> None:
        """Write the state behind the last iteration into its checkpoint's folder, on one rank."""
        if dist.get_rank() != data_writer(self.args):
            return
        consumed = self.args.consumed_train_samples
        state = self._states.get(consumed)
        if state is not None:
            content = {"version": _VERSION, "consumed": consumed, "state": state}
            write_text(folder / DATA_FILE, json.dumps(content) + "\n")

    def load(self) -> dict[str, Any] | None:
        """The state in the checkpoint that the run has begun with; None where it begins anew.

        Raises:
            ConfigError: the checkpoint has none, or one that is damaged.
        """
        args = self.args
        if not args.consumed_train_samples or getattr(args, "restart_data", False):
            return None
        file = Path(args.load) / iteration_name(args.iteration) / DATA_FILE
        remedy = "begin the data anew with --restart-data"
        if not file.is_file():
            raise ConfigError(
                f"the checkpoint {file.parent} does not say where its data stand (no {DATA_FILE}): "
                f"it is of a run that read other data; {remedy}"
            )
        try:
            content = json.loads(file.read_text())
            state: dict[str, Any] = content["state"]
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}, expected {_VERSION}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged: {error}; {remedy}") from error
        return state


class RankPlan:
    """The micro-batches of one data-parallel rank, in order: what each is to hold.

    Args:
        batches: forms global batches; on every rank alike.
        size_at: sequences of the global batch that begins after so many.
        start: sequences before the first one.
        dp_rank, dp_size: this rank among the data-parallel ones.
        micro_batch: sequences of a micro-batch.
        cost: of an item.
        log: of bad samples, whose counts are part of the state.
        position: is told the position behind each batch.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        *,
        size_at: Callable[[int], int],
        start: int,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        cost: Callable[[Item], float],
        log: BadSampleLog,
        position: DataPosition,
    ) -> None:
        self.failure: MimoError | None = None
        self._batches = batches
        self._size_at = size_at
        self._consumed = start
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._micro_batch = micro_batch
        self._cost = cost
        self._log = log
        self._position = position
        self._recent: dict[int, list[tuple[Item, ...]]] = {}
        position.note(start, self._state())

    def __iter__(self) -> Iterator[tuple[Item, ...]]:
        """The plan; it ends where the data end or a record is bad, as ``failure`` then says."""
        while True:
            try:
                batch = self._batches.form(self._size_at(self._consumed))
            except MimoError as error:  # raised by who reads, once all before has been trained on
                self.failure = error
                return
            mine = self._share(batch)
            done = self._position.args.consumed_train_samples
            self._recent = {at: one for at, one in self._recent.items() if at >= done}
            self._recent[self._consumed] = mine
            self._consumed += len(batch.items)
            self._position.note(self._consumed, self._state())
            yield from mine

    def micro_batch(self, number: int) -> tuple[Item, ...]:
        """This rank's micro-batch of the iteration that is being computed, for messages."""
        return self._recent[self._position.args.consumed_train_samples][number]

    def _share(self, batch: GlobalBatch) -> list[tuple[Item, ...]]:
        costs = [self._cost(item) for item in batch.items]
        shares = divide(costs, self._dp_size, self._micro_batch)
        return [tuple(batch.items[at] for at in numbers) for numbers in shares[self._dp_rank]]

    def _state(self) -> dict[str, Any]:
        return {**self._batches.state_dict(), "bad": self._log.state_dict()}


def measures_of(
    measure: Callable[[Draw], Measure | BadSample],
    *,
    workers: int,
    group: dist.ProcessGroup | None,
    late: list[BadSample],
) -> Measures:
    """Measures in worker processes, if there are any, and shared over a group, if there is one."""
    inner: Measures
    if workers:
        inner = MeasuresInWorkers(measure, max(1, workers // 2))
    else:
        inner = MeasuresHere(measure)
    return inner if group is None else SharedMeasures(inner, group, late)


def batch_sizes(args: Namespace) -> Callable[[int], int]:
    """How many sequences the global batch has that begins after so many, by Megatron's schedule."""
    from megatron.core import num_microbatches_calculator as calculators

    mine = copy.deepcopy(calculators._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    assert mine is not None, "Megatron's globals are set before data are read"

    def size_at(consumed: int) -> int:
        mine.update(consumed, consistency_check=False)
        return int(mine.get()) * args.micro_batch_size * args.data_parallel_size

    return size_at


def next_micro_batches(args: Namespace) -> int:
    """How many micro-batches a rank has in the iteration after this one; 0 where there is none."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    if args.train_iters is not None and args.curr_iteration + 1 >= args.train_iters:
        return 0
    together = args.micro_batch_size * args.data_parallel_size
    consumed = args.consumed_train_samples + get_num_microbatches() * together
    return batch_sizes(args)(consumed) // together


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group of the same ranks for objects in host memory; None for a rank alone.

    Collective over all ranks of the job, each with its own group.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_process_group_ranks(group))
    mine: Any = None
    for members in sorted({tuple(one) for one in everyone}):
        if len(members) == 1:
            continue
        made = dist.new_group(list(members), backend="gloo")
        if dist.get_rank() in members:
            mine = made
    return mine
