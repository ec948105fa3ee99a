"""What the counter takes for a wait: the same statements give the same counts on every torch."""

from __future__ import annotations

import pytest
import torch

from megatron.mimo.backend.host_sync import HostSyncCounter

MASKED_FILLS = [
    "x[mask] = 1.0",
    "x[mask] = 0",
    "x[mask] = torch.tensor(2.0)",
    "x[:, mask[:3]] = 0.0",
    "x[mask, 0] = 1.0",
    "x[mask.unsqueeze(1).expand(4, 3)] = 0",
    "x.masked_fill_(mask.unsqueeze(1), 1.0)",
    "x.masked_fill(mask.unsqueeze(1), float('-inf'))",
    "x.masked_fill(mask.unsqueeze(1), torch.tensor(2.0))",
    "x[mask] = 0.0; x.sum().backward()",
    "x[rows] = 1.0",
    "x[rows] = x.sum()",
]
WAITS = {
    "x[mask] = torch.ones(3)": "aten::index_put_",
    "x[mask] = torch.ones(2, 3)": "aten::index_put_",
    "x[mask] = torch.ones(1)": "aten::index_put_",  # not a number: computed, on the device
    "x[mask] = x.sum()": "aten::index_put_",
    "x[mask] = torch.zeros(())": "aten::index_put_",
    "x[mask, rows] = 0.0": "aten::index_put_",
    "x[mask, torch.tensor([True, True, False])] = 0.0": "aten::index_put_",
    "x.index_put((mask,), torch.tensor(1.0), accumulate=True)": "aten::index_put",
    "x.index_put_((mask,), torch.tensor(1.0), accumulate=True)": "aten::index_put_",
    "x.masked_fill_(mask.unsqueeze(1), x.sum())": "aten::masked_fill_",
    "x.masked_fill(mask.unsqueeze(1), x.sum())": "aten::masked_fill",
    "x[mask]": "aten::index",
}


def count(statement: str, device: str = "cpu") -> dict[str, int]:
    names = {
        "torch": torch,
        "x": torch.zeros(4, 3, device=device, requires_grad=True) * 2,
        "mask": torch.tensor([True, False, True, False], device=device),
        "rows": torch.tensor([0, 2], device=device),
        "ours": torch.zeros((), device=device),
    }
    with HostSyncCounter() as counter:
        exec(statement, names)
    return dict(counter.counts)


@pytest.mark.parametrize("statement", MASKED_FILLS)
def test_a_masked_fill_with_a_number_does_not_wait(statement: str) -> None:
    assert count(statement) == {}


@pytest.mark.parametrize(("statement", "name"), WAITS.items())
def test_other_masks_wait(statement: str, name: str) -> None:
    assert count(statement) == {name: 1}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("x.index_put_((mask,), torch.tensor(1.0))", {}),
        ("x.index_put_((mask,), torch.tensor([1.0, 2.0, 3.0]))", {"aten::index_put_": 1}),
        ("x.index_put_((mask,), ours)", {"aten::index_put_": 1}),
        ("x.masked_fill_(mask.unsqueeze(1), ours)", {"aten::masked_fill_": 1}),
    ],
)
def test_a_device_waits_for_numbers_that_it_holds(statement: str, expected: dict[str, int]) -> None:
    assert count(statement, device="meta") == expected
