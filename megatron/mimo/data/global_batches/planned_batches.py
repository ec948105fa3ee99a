"""Reads and collates planned micro-batches: the dataset of worker processes.

Shape legend: B micro-batch, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample, BadSamplePolicy
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.global_batches.balance import CostModel
from megatron.mimo.data.global_batches.forming import Item
from megatron.mimo.data.measure import Measure, check_measure
from megatron.mimo.data.micro_batches.batch import SOURCE_IDS, SOURCE_NAMES, Batch
from megatron.mimo.data.micro_batches.collate import SampleCollator
from megatron.mimo.data.micro_batches.counting import collate_and_count
from megatron.mimo.data.micro_batches.packing import PackingCollator
from megatron.mimo.data.sample import Sample
from megatron.mimo.data.sources import Draw, Mixture

__all__ = ["LEFT_OUT", "PlannedBatches", "SampleSources"]

LEFT_OUT = "left_out"  # entry of a batch: bad samples that were found when they were decoded


@dataclass(frozen=True, kw_only=True)
class SampleSources:
    """Training data as records in files: what is drawn, and how a record becomes a sample.

    Attributes:
        mixture: what is drawn from.
        read: a record's sample, or why there is none.
        measure: a record's measure, without decoding more than necessary.
        policy: what is done with bad samples.
        costs: of samples, for balance.
        look_ahead: samples in the buffer when a sequence is packed.
    """

    mixture: Mixture
    read: Callable[[RawRecord], Sample | BadSample]
    measure: Callable[[RawRecord], Measure | BadSample]
    policy: BadSamplePolicy = field(default_factory=BadSamplePolicy)
    costs: CostModel = field(default_factory=CostModel)
    look_ahead: int = 256

    def measured(self, draw: Draw) -> Measure | BadSample:
        """The measure of a draw.

        Raises:
            InputError: the record is bad, and the policy is to stop.
        """
        record = self._record(draw)
        return record if isinstance(record, BadSample) else self.measure(record)

    def sample(self, draw: Draw) -> Sample | BadSample:
        """The sample of a draw.

        Raises:
            InputError: the record is bad, and the policy is to stop.
        """
        record = self._record(draw)
        return record if isinstance(record, BadSample) else self.read(record)

    def _record(self, draw: Draw) -> RawRecord | BadSample:
        try:
            return self.mixture.read(draw)
        except InputError as error:
            if self.policy.on_bad_sample == "stop":
                raise
            file = self.mixture.sources[draw.source].files.paths[draw.file]
            place = f"record {draw.record + 1}"
            return BadSample(
                file=str(file), place=place, medium=None, kind="bad", reason=str(error)
            )


class PlannedBatches(Dataset[Batch]):
    """Collated micro-batches, by the items that they are planned to hold.

    A sample that turns out to be bad only when its media are decoded leaves its place empty: the
    rest of the batch, and every other batch, stay as planned.

    Args:
        sources: read the samples.
        collate: a ``PackingCollator`` packs; then the items of a micro-batch are one row.
    """

    def __init__(self, sources: SampleSources, collate: SampleCollator) -> None:
        self._sources = sources
        self._collate = collate
        self._shows_sources = len(sources.mixture.names) > 1

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """Read and collate.

        Raises:
            InputError: a sample is bad and the policy is to stop, or its length is not the
                planned one.
        """
        read = [self.samples(item) for item in items]
        kept = [[one for one in samples if isinstance(one, Sample)] for samples in read]
        blank = [self._blank()]
        rows = [samples or blank for samples in kept]
        if isinstance(self._collate, PackingCollator):
            batch = collate_and_count(self._collate, [tuple(samples) for samples in rows])
        else:
            batch = collate_and_count(self._collate, [samples[0] for samples in rows])
        bad = [one for samples in read for one in samples if isinstance(one, BadSample)]
        bad += [
            self._cut(sample, planned.draw)
            for item, samples in zip(items, read, strict=True)
            for planned, sample in zip(item, samples, strict=True)
            if isinstance(sample, Sample) and sample.cut_turns
        ]
        if bad:
            batch[LEFT_OUT] = bad
        if self._shows_sources:
            batch[SOURCE_NAMES] = self._sources.mixture.names
            batch[SOURCE_IDS] = self._source_ids(items, read, batch["input_ids"].shape)
        return batch

    def samples(self, item: Item) -> list[Sample | BadSample]:
        """Read the samples of an item.

        Raises:
            InputError: as ``__getitem__``.
        """
        found = []
        for planned in item:
            sample = self._sources.sample(planned.draw)
            if isinstance(sample, Sample) and planned.measure is not None:
                check_measure(sample, planned.measure)
            found.append(sample)
        return found

    def _cut(self, sample: Sample, draw: Draw) -> BadSample:
        """The entry in the log of bad samples for a sample that lost turns."""
        return BadSample(
            file=str(self._sources.mixture.sources[draw.source].files.paths[draw.file]),
            place=f"record {draw.record + 1}",
            medium=None,
            kind="cut",
            reason=f"{sample.name}: {sample.cut_turns} turns were cut away, so that it fits",
        )

    def _blank(self) -> Sample:
        """A sample without labels, where all of a sequence were left out."""
        return Sample(
            name="a place that was left empty",
            token_ids=torch.tensor([self._collate.pad_id]),
            is_label=torch.zeros(1, dtype=torch.bool),
        )

    def _source_ids(
        self, items: Sequence[Item], read: Sequence[Sequence[Any]], shape: Sequence[int]
    ) -> Tensor:
        """The source of each position: int64 [B, S]; the number of sources where there is none.

        Packed sequences are one row.
        """
        none = len(self._sources.mixture.names)
        ids_BS = torch.full(tuple(shape), none, dtype=torch.int64)
        multiple = getattr(self._collate, "multiple", 1)
        sources_NS = ids_BS.view(len(items), -1)
        for row, (item, samples) in enumerate(zip(items, read, strict=True)):
            start = 0
            for planned, sample in zip(item, samples, strict=True):
                if isinstance(sample, Sample):
                    length = len(sample.token_ids)
                    sources_NS[row, start : start + length] = planned.draw.source
                    start += -(-length // multiple) * multiple
        return ids_BS
