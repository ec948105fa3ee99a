"""What a run says when it ends."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.process.failure import describe


class Unreadable(Dataset[None]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise InputError(f"line {index}: ValueError: bad: x")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_data_is_one_line_wherever_it_is_read(workers: int) -> None:
    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Unreadable(), num_workers=workers)))
    assert describe(caught.value) == "line 0: ValueError: bad: x"
