"""Adam against torch's classes, bit for bit, and its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from megatron.mimo.layers import Adam

SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-6}


def make_groups(device: str = "cpu") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    weights = [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), ())
    ]
    return [
        {"params": weights[:2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": weights[2:], "lr": 3e-2, "weight_decay": 0.0},
    ]


def take_steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                generator = torch.Generator().manual_seed(100 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(
                    parameter.device
                )
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for ours, theirs in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                one.state[ours][key], other.state[theirs][key], rtol=0, atol=0
            )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch_bit_for_bit(decoupled: bool, device: str) -> None:
    ours = Adam(make_groups(device), adam_w_mode=decoupled, **SETTINGS)
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    torchs = reference(make_groups(device), **SETTINGS)
    take_steps(ours, 0, 20)
    take_steps(torchs, 0, 20)
    assert_same(ours, torchs)
    assert [group["step"] for group in ours.param_groups] == [20, 20]
    assert set(ours.state[weights(ours)[0]]) == {"exp_avg", "exp_avg_sq"}


def test_continues_from_its_state_and_from_torchs() -> None:
    uninterrupted = Adam(make_groups(), **SETTINGS)
    take_steps(uninterrupted, 0, 9)
    for source in (Adam, torch.optim.AdamW):
        first = source(make_groups(), **SETTINGS)
        take_steps(first, 0, 4)
        second = Adam(copy.deepcopy(first.param_groups), **SETTINGS)
        second.load_state_dict(first.state_dict())
        take_steps(second, 4, 9)
        assert_same(second, uninterrupted)


def test_fresh_state_loads_and_stays_empty() -> None:
    optimizer = Adam(make_groups())
    optimizer.load_state_dict(Adam(make_groups()).state_dict())
    assert not optimizer.state  # DistributedOptimizer asks whether state was allocated
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


def test_counts_that_differ_are_refused() -> None:
    torchs = torch.optim.AdamW(make_groups())
    take_steps(torchs, 0, 2)
    torchs.state[weights(torchs)[0]]["step"] += 1
    with pytest.raises(ValueError, match=r"counts \[2, 3\] steps"):
        Adam(make_groups()).load_state_dict(torchs.state_dict())


def test_parameters_without_gradient_stay() -> None:
    optimizer = Adam(make_groups())
    before = [weight.clone() for weight in weights(optimizer)]
    weights(optimizer)[2].grad = torch.ones(())
    assert optimizer.step(lambda: 7.0) == 7.0
    after = weights(optimizer)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"capturable": True}]
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected none negative|optimizer_cuda_graph"):
        Adam(make_groups(), **bad)
