"""Packing: which samples share a sequence, and the micro-batch of packed sequences.

A packed sequence [1, T] holds documents side by side; attention, positions and labels end at their
borders. Shape legend: T tokens of a sequence, padding included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import ConfigError, InputError, MimoError
from megatron.mimo.data.micro_batches.collate import PlacedSample, SampleCollator
from megatron.mimo.data.sample import Sample

__all__ = [
    "PACKING_MULTIPLE",
    "FirstFit",
    "PackedDataset",
    "PackedSequence",
    "PackingCollator",
    "first_fit",
    "packed_sequences",
]

PACKING_MULTIPLE = 8  # tokens; samples are packed as if padded to a multiple of it
PackedSequence = tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class PackingCollator(SampleCollator):
    """Turns the samples of packed sequences into what ``MimoModel.forward`` takes: one row.

    Attributes:
        seq_length: T of one packed sequence; a micro-batch of n is one row of n * T tokens.
        cp_size: context-parallel size: each document is padded to a multiple of 2 * cp_size,
            because it is dealt out in as many chunks.
        tp_size: tensor-parallel size under sequence parallelism, else 1.
    """

    cp_size: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.multiple * self.tp_size
        if self.seq_length % factor:
            raise ConfigError(
                f"seq_length {self.seq_length} is not divisible by 2*cp*tp = {factor}; use "
                f"{-(-self.seq_length // factor) * factor}"
            )

    @property
    def multiple(self) -> int:
        """What the place of each document is a multiple of."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def __call__(self, samples: Sequence[Sample | PackedSequence]) -> dict[str, Any]:
        """Collate packed sequences, one behind the other.

        Args:
            samples: items of a ``PackedDataset``, or the samples of one sequence.

        Returns:
            What ``SampleCollator`` gives, with B = 1 and S = n * T, and ``packing_kwargs``: the
            documents' borders as Python integers, which stay on the host wherever the tensors go.
            Position ids start anew in each document, the last token of a document has no label.

        Raises:
            InputError: samples beside sequences, a sequence without samples or with more than fit
                into it; as ``SampleCollator``.
        """
        places: list[PlacedSample] = []
        lengths: list[int] = []
        rooms: list[int] = []
        sequences = _sequences(samples)
        for number, documents in enumerate(sequences):
            begin = number * self.seq_length
            own = self._placed(documents, begin)
            end = own[-1].start + own[-1].length
            rest = [begin + self.seq_length - end] if end < begin + self.seq_length else []
            places += own
            lengths += [*(len(sample.token_ids) for sample in documents), *(0 for _ in rest)]
            rooms += [*(place.length for place in own), *rest]
        batch = self._fill([places], length=len(sequences) * self.seq_length)
        batch["packing_kwargs"] = _borders(lengths, rooms)
        return batch

    def _placed(self, documents: PackedSequence, begin: int) -> list[PlacedSample]:
        """The documents of one sequence, from a position on."""
        places, start = [], begin
        for sample in documents:
            self._check_tokens(sample)
            length = -(-len(sample.token_ids) // self.multiple) * self.multiple
            places.append(PlacedSample(sample=sample, start=start, length=length))
            start += length
        if start - begin > self.seq_length:
            raise InputError(
                f"{len(documents)} samples ({documents[0].name} to {documents[-1].name}) take "
                f"{start - begin} tokens in one sequence of seq_length {self.seq_length}; pack "
                "fewer"
            )
        return places


def _sequences(items: Sequence[Sample | PackedSequence]) -> list[PackedSequence]:
    """The packed sequences of a micro-batch: its items, or all of its samples as one."""
    packed = [item for item in items if not isinstance(item, Sample)]
    samples = tuple(item for item in items if isinstance(item, Sample))
    if packed and samples:
        raise InputError(
            f"a micro-batch of {len(packed)} packed sequences and {len(samples)} samples; expected "
            "one or the other"
        )
    sequences = packed or [samples]
    if not all(sequences):
        raise InputError("a packed sequence of 0 samples; expected at least one")
    return sequences


def _borders(lengths: Sequence[int], rooms: Sequence[int]) -> dict[str, Any]:
    """``packing_kwargs`` of documents: their lengths, and their places' sizes with padding."""
    borders: dict[str, Any] = {}
    sums = tuple(itertools.accumulate(lengths, initial=0))
    padded = tuple(itertools.accumulate(rooms, initial=0))
    for kind in ("q", "kv"):
        borders[f"cu_seqlens_{kind}"] = sums
        if padded != sums:
            borders[f"cu_seqlens_{kind}_padded"] = padded
        borders[f"max_seqlen_{kind}"] = max(rooms)
    return borders


class FirstFit:
    """Puts items into bins, one after the other: each into the oldest open bin that has room.

    A bin that is closed stays as it is, whatever follows: the first ``closed`` bins are a function
    of the items so far alone.

    Args:
        capacity: of a bin.
        open_bins: when more bins than this are open, the oldest is closed: bounds the work, and
            how far items are moved.

    Attributes:
        bins: item numbers of each, ascending, in the order in which bins were opened.
    """

    def __init__(self, capacity: int, *, open_bins: int = 64) -> None:
        self.bins: list[list[int]] = []
        self._capacity = capacity
        self._open_bins = open_bins
        self._free: dict[int, int] = {}  # open bin -> room in it, oldest first
        self._count = 0

    @property
    def closed(self) -> int:
        """How many bins, from the first, are final."""
        return next(iter(self._free), len(self.bins))

    def add(self, length: int) -> None:
        """Place the next item.

        Raises:
            InputError: it is longer than a bin.
        """
        if length > self._capacity:
            raise InputError(
                f"sample {self._count} takes {length} tokens, more than a sequence of "
                f"{self._capacity}; raise --seq-length or shorten the sample"
            )
        index = next((index for index, room in self._free.items() if room >= length), None)
        if index is None:
            index = len(self.bins)
            self.bins.append([])
            self._free[index] = self._capacity
            if len(self._free) > self._open_bins:
                del self._free[next(iter(self._free))]
        self.bins[index].append(self._count)
        self._count += 1
        self._free[index] -= length
        if not self._free[index]:
            del self._free[index]


def first_fit(lengths: Sequence[int], capacity: int, *, open_bins: int = 64) -> list[list[int]]:
    """The bins of ``FirstFit`` for items of these lengths.

    Raises:
        InputError: an item that is longer than a bin.
    """
    fit = FirstFit(capacity, open_bins=open_bins)
    for length in lengths:
        fit.add(length)
    return fit.bins


class PackedDataset(Dataset[PackedSequence]):
    """Packed sequences of a dataset, by first fit; number i is a function of the lengths alone.

    All samples are in some sequence: one pass over the dataset. ``packed_sequences`` gives those
    of a dataset that goes on as long as a run asks for samples.

    Every rank computes the same ones, and a run resumes at any of them by its number.

    Args:
        dataset: map-style, of ``Sample``.
        seq_length: T.
        multiple: places are multiples of this; ``PackingCollator.multiple``.
        lengths: tokens of each sample; None reads every sample once for its length.
        packed: sample numbers of each sequence, where they are known already.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        seq_length: int,
        multiple: int = 1,
        lengths: Sequence[int] | None = None,
        packed: list[list[int]] | None = None,
    ) -> None:
        self._dataset = dataset
        if packed is not None:
            self._packed = packed
            return
        count: int = len(dataset)  # type: ignore[arg-type]
        if lengths is None:
            lengths = [_length(dataset, index) for index in range(count)]
        if len(lengths) != count:
            raise ConfigError(f"{len(lengths)} lengths for {count} samples; give one for each")
        places = [-(-length // multiple) * multiple for length in lengths]
        self._packed = first_fit(places, seq_length)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> PackedSequence:
        return tuple(self._dataset[number] for number in self._packed[index])


def packed_sequences(
    larger: Callable[[int], Dataset[Sample]], count: int, *, seq_length: int, multiple: int = 1
) -> PackedDataset:
    """The first ``count`` packed sequences of samples that go on as long as they are asked for.

    Sequence i is a function of the samples alone: asking for more adds some behind those there
    are. One counts once no later sample can join it, so that samples of some 64 more are read for
    their lengths. Where the dataset ends, the sequences are those of one pass over it.

    Args:
        larger: gives a dataset of this many samples, or fewer where there are no more; sample i is
            the same in each.
        count: how many are needed.
        seq_length: T.
        multiple: as ``PackedDataset`` takes it.
    """
    fit = FirstFit(seq_length)
    read, wanted = 0, max(count, 1)
    while True:
        dataset = larger(wanted)
        available: int = len(dataset)  # type: ignore[arg-type]
        while read < available and fit.closed < count:
            length = _length(dataset, read)
            fit.add(-(-length // multiple) * multiple)
            read += 1
        if fit.closed >= count:
            done = fit.bins[:count]
        elif available < wanted:
            done = fit.bins
        else:
            wanted *= 2
            continue
        return PackedDataset(dataset, seq_length=seq_length, packed=done)


def _length(dataset: Dataset[Sample], index: int) -> int:
    """Tokens of a sample.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return len(dataset[index].token_ids)
    except MimoError:
        raise
    except Exception as error:  # of a data set that anyone has written
        raise InputError(
            f"sample {index} cannot be read for its length: {type(error).__name__}: {error}; "
            "correct it, or leave --pack out"
        ) from error
