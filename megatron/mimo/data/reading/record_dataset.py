"""Records in files as a dataset with a length: what validation reads, in the order of the files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from torch.utils.data import Dataset

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.data.bad_samples import BadSample
from megatron.mimo.data.formats import RawRecord
from megatron.mimo.data.sample import Sample
from megatron.mimo.data.sources.record_file import RecordFile

__all__ = ["RecordDataset"]


class RecordDataset(Dataset[Sample]):
    """Samples of records; in the place of a record that gives none stands the next that does.

    Args:
        files: of records.
        read: a record's sample, or why there is none.

    Raises:
        InputError: there are no records.
    """

    def __init__(
        self, files: Sequence[RecordFile], read: Callable[[RawRecord], Sample | BadSample]
    ) -> None:
        self._files = files
        self._read = read
        self._ends = list(accumulate(len(file) for file in files))
        if not len(self):
            names = ", ".join(str(file.path) for file in files)
            raise InputError(f"{names}: no records; expected at least one")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        reason = ""
        for number in range(index, index + len(self)):
            at = number % len(self)
            file = bisect_right(self._ends, at)
            record = self._files[file][at - (self._ends[file - 1] if file else 0)]
            sample = self._read(record)
            if isinstance(sample, Sample):
                return sample
            reason = sample.reason
        raise InputError(f"none of {len(self)} records gives a sample; the last one: {reason}")
