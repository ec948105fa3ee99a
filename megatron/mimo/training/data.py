"""Endless streams of micro-batches, the same global batches in every layout.

Of map-style datasets the order is a function of the sample number alone: global batch i holds
samples ``[i * global, (i + 1) * global)``, and a micro-batch of data-parallel rank r is the r-th
slice of the next ``micro * dp`` of them. Resuming is starting at another number. Records in files
are planned (``planned_data``): their position is a state, which lies in the checkpoint.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.mimo.data import PackedDataset, PackingCollator, SampleCollator
from megatron.mimo.data.global_batches.planned_batches import SampleSources
from megatron.mimo.data.micro_batches.batch import Batch, Collator, batch_device, keep_for_stage
from megatron.mimo.data.micro_batches.broadcast import broadcast_batch
from megatron.mimo.data.micro_batches.counting import collate_and_count
from megatron.mimo.data.micro_batches.device_ahead import Ahead, copying_to
from megatron.mimo.data.micro_batches.packing import PACKING_MULTIPLE, packed_sequences
from megatron.mimo.data.row_cache.agreement import agreed
from megatron.mimo.data.row_cache.lookup import Caches, with_rows
from megatron.mimo.recipes.recipe import Datasets, Recipe
from megatron.mimo.training.encoder_cache import EncoderCaches
from megatron.mimo.training.module_ranks import encodes_alone
from megatron.mimo.training.origins import RangeOrigins, SampleFinder
from megatron.mimo.training.planned_data import planned_batches
from megatron.mimo.training.plans import DataPosition, host_group
from megatron.mimo.training.row_kernels import places_by_kernels
from megatron.mimo.training.throughput import ThroughputMeter
from megatron.mimo.training.workers import read_batches

__all__ = ["BatchIterator", "MicroBatches", "SampleRange", "dataset_provider"]


@dataclass(frozen=True, kw_only=True)
class SampleRange:
    """Which samples a data-parallel rank reads, micro-batch by micro-batch.

    Attributes:
        start: number of the first sample of the stream, over all ranks.
        period: the stream starts over from sample 0 after this many samples (None: never).
        micro_batch: samples of one micro-batch on one rank.
        dp_rank, dp_size: this rank among the data-parallel ones.
    """

    start: int
    period: int | None
    micro_batch: int
    dp_rank: int
    dp_size: int

    def __iter__(self) -> Iterator[int]:
        """The first sample number of each of this rank's micro-batches."""
        at = self.start
        while True:
            yield (at if self.period is None else at % self.period) + (
                self.dp_rank * self.micro_batch
            )
            at += self.micro_batch * self.dp_size


class MicroBatches(Dataset[Batch]):
    """Collated micro-batches by the number of their first sample.

    A dataset that is shorter than the run is read again from its start; shuffling is its own
    business.
    """

    def __init__(
        self, split: str, dataset: Dataset[Any], collate: Collator, micro_batch: int
    ) -> None:
        self._split = split
        self._dataset = dataset
        self._collate = collate
        self._micro_batch = micro_batch
        self._length: int = len(dataset)  # type: ignore[arg-type]
        if self._length == 0:
            raise ConfigError(f"the {split} dataset is empty; expected at least one sample")

    def __len__(self) -> int:
        """Samples, or packed sequences, of one pass."""
        return self._length

    def __getitem__(self, first: int) -> Batch:
        numbers = range(first, first + self._micro_batch)
        items = [self.read(number % self._length) for number in numbers]
        return collate_and_count(self._collate, items)

    def read(self, index: int) -> Any:
        """Sample, or packed sequence, ``index``."""
        try:
            return self._dataset[index]
        except Exception as error:
            raise InputError(
                f"sample {index} of the {self._split} dataset cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error


class BatchIterator:
    """This rank's micro-batches, on its device; ranks of one TP group get the same ones.

    ``next`` is collective over the tensor-parallel group: its first rank reads, the others
    receive. An error in reading is raised on all of them. On a GPU, a rank that is alone in its
    group has the next micro-batch copied while it computes.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Batch]],
        *,
        group: torch.distributed.ProcessGroup,
        device: torch.device,
        keep: Callable[[Batch], Batch],
        meter: ThroughputMeter | None = None,
    ) -> None:
        self._open = batches if meter is None else meter.watched(batches)
        self._batches: Iterator[Batch] | None = None
        self._group = group
        self._device = device
        self._keep, self._meter = keep, meter
        self._ahead: Ahead | None = None
        self._peeked: deque[Callable[[], Batch]] = deque()
        if group.size() == 1 and device.type != "cpu":
            self._ahead = Ahead(self._load, copying_to(device))

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        batch = self._peeked.popleft()() if self._peeked else self._read()
        if self._meter is not None:
            self._meter.take()
        return batch

    def peek(self, count: int) -> list[Batch]:
        """What ``next`` will give, collective as it is; fewer where reading fails before."""
        while len(self._peeked) < count:
            self._peeked.append(self._outcome())
        found = []
        for outcome in itertools.islice(self._peeked, count):
            try:
                found.append(outcome())
            except Exception:  # noqa: BLE001 - next raises it
                break
        return found

    def _outcome(self) -> Callable[[], Batch]:
        """What gives the next micro-batch, or raises what reading it has."""
        try:
            batch = self._read()
        except Exception as error:  # noqa: BLE001 - raised when it is asked for
            return partial(_raise, error)
        return lambda: batch

    def _read(self) -> Batch:
        if self._ahead is not None:
            return dict(self._ahead())
        batch: Batch = broadcast_batch(self._load, self._group, self._device)
        return batch

    def _load(self) -> Batch:
        if self._batches is None:
            self._batches = self._open()
        return self._keep(next(self._batches))


def _raise(error: Exception) -> Batch:
    raise error


def dataset_provider(
    recipe: Recipe,
    args: Namespace,
    samples: SampleFinder | None = None,
    position: DataPosition | None = None,
    caches: EncoderCaches | None = None,
    meter: ThroughputMeter | None = None,
) -> Callable[..., tuple[Any, Any, Any]]:
    """The function that Megatron's ``pretrain`` calls on every rank to get its data iterators.

    ``samples`` is told what the training stream reads, and ``position`` where it stands;
    ``caches`` may have rows of its media, and ``meter`` counts its tokens. Ranks of the middle
    pipeline stages get None where they take hidden states only: attention to packed samples or to
    spans, and multimodal RoPE, read the batch on every stage, and so do encoders on grids
    of their own. Encoders on ranks of their own are told what to encode, and read nothing.
    """
    from megatron.core import mpu

    def provide(
        counts: tuple[int, int | None, int | None], vp_stage: int | None = None
    ) -> tuple[Iterator[Batch] | None, Iterator[Batch] | None, Iterator[Batch] | None]:
        first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        collate = recipe.build_collator(args)
        group = host_group(mpu.get_data_parallel_group())  # collective over the whole job
        sharers = _cache_sharers(args)  # likewise
        encodes = bool(args.component) and not vp_stage
        if encodes_alone(args):
            found = split_datasets(recipe, args, (counts[0], counts[1] or 0, counts[2] or 0))
            return _elsewhere(found.train), _elsewhere(found.valid), _elsewhere(found.test)
        if not (first or last or encodes or _every_stage_reads(args, collate)):
            return None, None, None
        counts = (counts[0], counts[1] or 0, counts[2] or 0)
        datasets = split_datasets(recipe, args, counts)
        known = caches.opened() if caches is not None else {}
        pack = packing_collator(recipe.name, args, collate) if args.pack else None
        keep = _keeper(args, collate, first=first, last=last, encodes=encodes)

        def stream(
            split: str, dataset: Dataset[Any] | SampleSources | None
        ) -> BatchIterator | None:
            opened: Callable[[], Iterator[Batch]]
            if dataset is None:
                return None
            if isinstance(dataset, SampleSources):
                at = position or DataPosition(args)
                opened = planned_batches(args, dataset, pack or collate, group, samples, at, known)
            else:
                fill = collate
                if split == "training" and pack is not None:
                    dataset, fill = pack_training_set(recipe, args, counts, dataset, pack), pack
                opened = range_batches(args, split, dataset, fill, samples, known)
            if split == "training" and known and sharers is not None:
                opened = agreed(opened, sharers)
            tp_group, device = mpu.get_tensor_model_parallel_group(), batch_device()
            counting = meter if split == "training" and not vp_stage else None
            return BatchIterator(opened, group=tp_group, device=device, keep=keep, meter=counting)

        return (
            stream("training", datasets.train),
            stream("validation", datasets.valid),
            stream("test", datasets.test),
        )

    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _cache_sharers(args: Namespace) -> torch.distributed.ProcessGroup | None:
    """The group of context-parallel ranks that look up encoders' caches; None if none is needed.

    Collective over the whole job.
    """
    from megatron.core import mpu

    if not getattr(args, "cache_encoder", None):
        return None
    return host_group(mpu.get_context_parallel_group())


def _elsewhere(dataset: Any) -> Iterator[Batch] | None:
    """The iterator of a rank that is told what to encode: there where others have one."""
    return None if dataset is None else iter(())


def range_batches(
    args: Namespace,
    split: str,
    dataset: Dataset[Any],
    collate: Collator,
    samples: SampleFinder | None,
    caches: Caches,
) -> Callable[[], Iterator[Batch]]:
    """A function that opens this rank's micro-batches of a map-style dataset."""
    from megatron.core import mpu

    training = split == "training"
    micro_batch = args.micro_batch_size if training else args.eval_micro_batch_size
    # every evaluation reads the same samples, so that its figures can be compared
    eval_period = max(args.eval_iters, 1) * args.eval_global_batch_size
    numbers = SampleRange(
        start=args.consumed_train_samples if training else 0,
        period=None if training else eval_period,
        micro_batch=micro_batch,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
    )
    batches = MicroBatches(split, dataset, collate, micro_batch)
    if training and samples is not None:
        samples.stream = RangeOrigins(batches, numbers, args)
    if not training:
        return lambda: read_batches(batches, numbers, 0)
    return lambda: read_batches(with_rows(batches, caches), numbers, args.num_workers)


def split_datasets(recipe: Recipe, args: Namespace, counts: tuple[int, int, int]) -> Datasets:
    """The recipe's datasets; refuses flags that ask for one which the recipe does not have."""
    datasets = recipe.build_datasets(args, counts)
    if datasets.train is None and counts[0] and not args.skip_train:
        raise ConfigError(f"recipe {recipe.name!r} gave no training dataset; expected one")
    if datasets.valid is None and counts[1]:
        raise ConfigError(
            f"--eval-iters {args.eval_iters}: recipe {recipe.name!r} gave no validation dataset; "
            "give --valid-data-path, if the recipe reads it, or --eval-iters 0"
        )
    return datasets


def _keeper(
    args: Namespace, collate: Collator, *, first: bool, last: bool, encodes: bool
) -> Callable[[Batch], Batch]:
    """A function that reduces a batch to what this pipeline stage needs."""
    return partial(
        keep_for_stage,
        pre_process=first or encodes,
        post_process=last,
        dtype=args.params_dtype,
        adapter=sequence_partition(args),
        # what all ranks of the first stage place is found from the uncut plan
        cut_plan=not encodes,
        index_plan=places_by_kernels(args, batch_device()),
        keep_plan=getattr(collate, "plan_on_every_stage", False),
    )


def _every_stage_reads(args: Namespace, collate: Collator) -> bool:
    spans = getattr(collate, "span_modalities", ())
    return bool(args.pack or args.position_embedding_type == "mrope" or spans)


def sequence_partition(args: Namespace) -> PartitionAdapter | None:
    """The adapter that cuts sequences for this rank, as in the model; None if they stay whole."""
    from megatron.core import mpu

    if args.context_parallel_size == 1 and not args.sequence_parallel:
        return None
    return PartitionAdapter(
        PartitionConfig(
            seq_parallel=args.sequence_parallel,
            use_cp=args.context_parallel_size > 1,
            tp_comm_overlap=args.tp_comm_overlap,
            max_seq_len=args.max_position_embeddings,
            cp_group=mpu.get_context_parallel_group(),
            tp_group=mpu.get_tensor_model_parallel_group(),
        )
    )


def packing_collator(name: str, args: Namespace, collate: Collator) -> PackingCollator:
    """The collator of packed sequences, from a recipe's collator of samples.

    Raises:
        ConfigError: the recipe has a collator of its own kind.
    """
    if type(collate) is not SampleCollator:
        raise ConfigError(
            f"--pack with recipe {name!r}, whose collator is a {type(collate).__name__}; it works "
            "with a SampleCollator: leave --pack away"
        )
    settings = {field.name: getattr(collate, field.name) for field in fields(SampleCollator)}
    tp_size = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return PackingCollator(**settings, cp_size=args.context_parallel_size, tp_size=tp_size)


def pack_training_set(
    recipe: Recipe,
    args: Namespace,
    counts: tuple[int, int, int],
    dataset: Dataset[Any],
    collate: PackingCollator,
) -> PackedDataset:
    """Packed sequences of the training samples.

    Which samples are packed together does not depend on the context-parallel size, up to
    ``PACKING_MULTIPLE / 2`` ranks, so that a run can go on in another layout.

    Sequence i is a function of data and seed alone: a run that is made longer reads the same ones
    first. A dataset that has as many samples as it is asked for is asked for more until they
    suffice; another ends, and is read again from its first sequence, pass by pass.
    """
    multiple = math.lcm(collate.multiple, PACKING_MULTIPLE)

    def larger(count: int) -> Dataset[Any]:
        train = dataset
        if count > len(dataset):  # type: ignore[arg-type]
            built = recipe.build_datasets(args, (count, *counts[1:])).train
            assert isinstance(built, Dataset), "the recipe has a training dataset"
            train = built
        return train

    return packed_sequences(larger, counts[0], seq_length=args.seq_length, multiple=multiple)
