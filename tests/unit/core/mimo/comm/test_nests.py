"""Nests of tensors as a header and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.models.mimo.comm.nests import (
    filled,
    header_of,
    large_bytes,
    read_header,
    size_of,
)
from megatron.core.models.mimo.errors import InputError

NEST: dict[str, Any] = {
    "pixels": torch.arange(6.0).view(2, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor(2.5, dtype=torch.bfloat16),
    "sizes": (torch.tensor([[4, 6]]), torch.tensor([True, False])),
    "clips": [torch.ones(0, 4), torch.full((1, 2), 7.0), None],
    "scale": 0.5,
    "names": ["a", "b"],
    "exact": False,
}


def test_small_tensors_travel_in_the_header_and_large_ones_beside_it() -> None:
    found = read_header(header_of(NEST))
    assert found["sizes"][0].tolist() == [[4, 6]]
    assert found["sizes"][1].tolist() == [True, False]
    assert type(found["sizes"]) is tuple
    assert found["pixels"].device.type == "meta"
    assert (found["scale"], found["names"], found["exact"]) == (0.5, ["a", "b"], False)
    content = large_bytes(NEST)
    assert content.numel() == size_of(found) == 32 + 16 + 16 + 16
    whole = filled(found, content)
    for key in ("pixels", "bytes", "half"):
        assert whole[key].dtype == NEST[key].dtype
        assert torch.equal(whole[key], NEST[key])
    assert whole["clips"][0].shape == (0, 4)
    assert whole["clips"][1].tolist() == [[7.0, 7.0]]
    assert whole["clips"][2] is None


def test_what_cannot_travel_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="an encoder's input is a object"):
        header_of({"file": object()})
