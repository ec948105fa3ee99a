"""Opens a data-parallel rank's stream of planned micro-batches."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.bad_samples import BadSample, BadSampleLog
from megatron.mimo.data.global_batches.forming import GlobalBatches, Item, Measures, Packing
from megatron.mimo.data.global_batches.measures import Unmeasured
from megatron.mimo.data.global_batches.planned_batches import (
    LEFT_OUT,
    PlannedBatches,
    SampleSources,
)
from megatron.mimo.data.micro_batches.batch import Batch, Collator
from megatron.mimo.data.micro_batches.collate import SampleCollator
from megatron.mimo.data.micro_batches.packing import PACKING_MULTIPLE, PackingCollator
from megatron.mimo.data.row_cache.lookup import Caches, with_rows
from megatron.mimo.training.origins import PlannedOrigins, SampleFinder
from megatron.mimo.training.plans import DataPosition, RankPlan, batch_sizes, measures_of
from megatron.mimo.training.workers import read_batches

__all__ = ["BAD_SAMPLES", "planned_batches"]

BAD_SAMPLES = "bad_samples.jsonl"  # in a run's folder


def planned_batches(
    args: Namespace,
    sources: SampleSources,
    collate: Collator,
    group: torch.distributed.ProcessGroup | None,
    samples: SampleFinder | None,
    position: DataPosition,
    caches: Caches,
) -> Callable[[], Iterator[Batch]]:
    """A function that opens this rank's stream of planned micro-batches; for ranks that read.

    Args:
        args: Megatron's.
        sources: the training data.
        collate: of samples, or of packed sequences.
        group: as ``host_group`` gives it for the data-parallel ranks.
        samples: is told what the stream reads.
        position: of the data.
        caches: of encoders, which may have rows of the media.

    Raises:
        ConfigError: the recipe's collator is of its own kind; the checkpoint does not say where the
            data stand, or says it of other data.
    """
    from megatron.core import mpu

    if not isinstance(collate, SampleCollator):
        raise ConfigError(
            f"records in files with a collator {type(collate).__name__}; expected a SampleCollator"
        )
    packing = _packing(args, collate, sources)
    first = torch.distributed.get_rank() == 0
    file = Path(args.output) / BAD_SAMPLES if first and args.output is not None else None
    log = BadSampleLog(sources.policy, file, warns=first)
    state = position.load()
    dp_rank, dp_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    batches = PlannedBatches(sources, collate)

    def cost(item: Item) -> float:
        measures = [one.measure for one in item if one.measure is not None]
        return sources.costs.of(measures, args.seq_length, packed=packing is not None)

    def opened() -> Iterator[Batch]:
        late: list[BadSample] = []
        workers = args.num_workers
        measures: Measures = Unmeasured()
        if packing is not None or dp_size > 1 or sources.policy.leaves_out:
            measures = measures_of(sources.measured, workers=workers, group=group, late=late)
        formed = GlobalBatches(
            sources.mixture, measures, packing=packing, left_out=log.add, late=late
        )
        if state is not None:
            formed.load_state_dict(state)
            log.load_state_dict(state["bad"])
        plan = RankPlan(
            formed,
            size_at=batch_sizes(args),
            start=args.consumed_train_samples,
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batch=args.micro_batch_size,
            cost=cost,
            log=log,
            position=position,
        )
        if samples is not None:
            samples.stream = PlannedOrigins(batches, plan)
        for batch in read_batches(with_rows(batches, caches), plan, workers):
            late.extend(batch.pop(LEFT_OUT, ()))
            yield batch
        assert plan.failure is not None, "a plan goes on for ever, or says why not"
        raise plan.failure

    return opened


def _packing(args: Namespace, collate: SampleCollator, sources: SampleSources) -> Packing | None:
    if not isinstance(collate, PackingCollator):
        return None
    return Packing(
        capacity=args.seq_length,
        multiple=math.lcm(collate.multiple, PACKING_MULTIPLE),
        look_ahead=sources.look_ahead,
    )
