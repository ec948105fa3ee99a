"""Several samples in one row: which, and the micro-batch of it.

A packed row [1, T] holds documents side by side; attention, positions and labels end at their
borders. Shape legend: T tokens of a row, padding included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import ConfigError, InputError, MimoError
from megatron.mimo.data.collate import Place, SampleCollator
from megatron.mimo.data.sample import Sample

__all__ = ["FirstFit", "PackedDataset", "PackingCollator", "Row", "first_fit", "rows_of"]

Row = tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class PackingCollator(SampleCollator):
    """Turns the samples of one row into the micro-batch that ``MimoModel.forward`` takes.

    Attributes:
        seq_length: T.
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

    def __call__(self, samples: Sequence[Sample | Row]) -> dict[str, Any]:
        """Collate one row.

        Args:
            samples: one item of a ``PackedDataset``, or the samples of one row.

        Returns:
            What ``SampleCollator`` gives, with B = 1, and ``packing_kwargs``: the documents'
            borders as Python integers, which stay on the host wherever the tensors go. Position
            ids start anew in each document, the last token of a document has no label.

        Raises:
            InputError: several rows, samples that do not fit into one, or as ``SampleCollator``.
        """
        documents = self._documents(samples)
        places, start = [], 0
        for sample in documents:
            self._check_tokens(sample)
            length = -(-len(sample.token_ids) // self.multiple) * self.multiple
            places.append(Place(sample=sample, start=start, length=length))
            start += length
        if start > self.seq_length:
            raise InputError(
                f"{len(documents)} samples ({documents[0].name} to {documents[-1].name}) take "
                f"{start} tokens in one row of seq_length {self.seq_length}; pack fewer"
            )
        batch = self._fill([places])
        rest = [self.seq_length - start] if start < self.seq_length else []
        lengths = [*(len(sample.token_ids) for sample in documents), *(0 for _ in rest)]
        rooms = [*(place.length for place in places), *rest]
        batch["packing_kwargs"] = _borders(lengths, rooms)
        return batch

    def _documents(self, samples: Sequence[Sample | Row]) -> list[Sample]:
        rows = [item for item in samples if not isinstance(item, Sample)]
        if rows and len(samples) > 1:
            raise InputError(
                f"a micro-batch of {len(samples)} packed rows; a packed micro-batch is one row: "
                "set --micro-batch-size 1 and make the rows longer"
            )
        documents = [*rows[0]] if rows else [item for item in samples if isinstance(item, Sample)]
        if not documents:
            raise InputError("a packed row of 0 samples; expected at least one")
        return documents


def _borders(lengths: Sequence[int], rooms: Sequence[int]) -> dict[str, Any]:
    """``packing_kwargs``: where documents of these lengths lie in places of these sizes."""
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
    """Puts items into rows, one after the other: each into the oldest open row that has room.

    A row that is closed stays as it is, whatever follows: the first ``closed`` rows are a function
    of the items so far alone.

    Args:
        capacity: of a row.
        open_rows: when more rows than this are open, the oldest is closed: bounds the work, and
            how far items are moved.

    Attributes:
        rows: rows of item numbers, ascending in each row, in the order in which rows were opened.
    """

    def __init__(self, capacity: int, *, open_rows: int = 64) -> None:
        self.rows: list[list[int]] = []
        self._capacity = capacity
        self._open_rows = open_rows
        self._free: dict[int, int] = {}  # open row -> room in it, oldest first
        self._count = 0

    @property
    def closed(self) -> int:
        """How many rows, from the first, are final."""
        return next(iter(self._free), len(self.rows))

    def add(self, length: int) -> None:
        """Place the next item.

        Raises:
            InputError: it is longer than a row.
        """
        if length > self._capacity:
            raise InputError(
                f"sample {self._count} takes {length} tokens, more than a row of "
                f"{self._capacity}; raise --seq-length or shorten the sample"
            )
        row = next((row for row, room in self._free.items() if room >= length), None)
        if row is None:
            row = len(self.rows)
            self.rows.append([])
            self._free[row] = self._capacity
            if len(self._free) > self._open_rows:
                del self._free[next(iter(self._free))]
        self.rows[row].append(self._count)
        self._count += 1
        self._free[row] -= length
        if not self._free[row]:
            del self._free[row]


def first_fit(lengths: Sequence[int], capacity: int, *, open_rows: int = 64) -> list[list[int]]:
    """The rows of ``FirstFit`` for items of these lengths.

    Raises:
        InputError: an item that is longer than a row.
    """
    fit = FirstFit(capacity, open_rows=open_rows)
    for length in lengths:
        fit.add(length)
    return fit.rows


class PackedDataset(Dataset[Row]):
    """Rows of a dataset's samples, by first fit; row i is a function of the lengths alone.

    All samples are in some row: one pass over the dataset. ``rows_of`` gives those of a dataset
    that goes on as long as a run asks for samples.

    Every rank computes the same rows, and a run resumes at any row by its number.

    Args:
        dataset: map-style, of ``Sample``.
        seq_length: T.
        multiple: places are multiples of this; ``PackingCollator.multiple``.
        lengths: tokens of each sample; None reads every sample once for its length.
        rows: sample numbers of each row, where they are known already.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        seq_length: int,
        multiple: int = 1,
        lengths: Sequence[int] | None = None,
        rows: list[list[int]] | None = None,
    ) -> None:
        self._dataset = dataset
        if rows is not None:
            self._rows = rows
            return
        count: int = len(dataset)  # type: ignore[arg-type]
        if lengths is None:
            lengths = [_length(dataset, index) for index in range(count)]
        if len(lengths) != count:
            raise ConfigError(f"{len(lengths)} lengths for {count} samples; give one for each")
        places = [-(-length // multiple) * multiple for length in lengths]
        self._rows = first_fit(places, seq_length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return tuple(self._dataset[number] for number in self._rows[index])


def rows_of(
    larger: Callable[[int], Dataset[Sample]], rows: int, *, seq_length: int, multiple: int = 1
) -> PackedDataset:
    """The first ``rows`` rows of samples that go on for as long as they are asked for.

    Row i is a function of the samples alone: asking for more rows adds rows behind those there
    are. A row counts once no later sample can join it, so that some 64 rows more are read for
    their lengths. Where the dataset ends, rows are those of one pass over it.

    Args:
        larger: gives a dataset of this many samples, or fewer where there are no more; sample i is
            the same in each.
        rows: how many are needed.
        seq_length: T.
        multiple: as ``PackedDataset`` takes it.
    """
    fit = FirstFit(seq_length)
    count, wanted = 0, max(rows, 1)
    while True:
        dataset = larger(wanted)
        available: int = len(dataset)  # type: ignore[arg-type]
        while count < available and fit.closed < rows:
            length = _length(dataset, count)
            fit.add(-(-length // multiple) * multiple)
            count += 1
        if fit.closed >= rows:
            done = fit.rows[:rows]
        elif available < wanted:
            done = fit.rows
        else:
            wanted *= 2
            continue
        return PackedDataset(dataset, seq_length=seq_length, rows=done)


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
