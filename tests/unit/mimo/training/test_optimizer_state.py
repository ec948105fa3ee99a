"""The state that an optimizer has before its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.mimo.backend import select_backend

DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    select_backend("cpu")


def build(inner: torch.optim.Optimizer, initialise: Any = None, **settings: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    config = OptimizerConfig(optimizer="adam", lr=0.1)
    vars(config).update(settings)
    return FP32Optimizer(inner, config, initialise)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_gets_zeros_and_steps_as_it_did(momentum: float) -> None:
    from megatron.mimo.training.optimizer_state import fill_state

    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    filled, plain = (torch.optim.SGD([weight], lr=0.1, momentum=momentum) for weight in weights)
    optimizer = build(filled)
    fill_state(optimizer)
    assert len(filled.state) == (momentum > 0)
    if momentum:
        assert filled.state[weights[0]]["momentum_buffer"].tolist() == [0, 0, 0]
    optimizer.init_state_fn(filled, optimizer.config)  # as a load calls it
    for step in range(3):
        for weight, inner in zip(weights, (filled, plain), strict=True):
            weight.grad = torch.full((3,), 1.0 + step)
            inner.step()
    assert torch.equal(weights[0], weights[1])


def test_others_are_filled_by_megatron_once_they_are_made() -> None:
    from megatron.mimo.layers import Adam
    from megatron.mimo.training.optimizer_state import fill_state

    def initialise(optimizer: Any, _: Any = None) -> None:
        calls.append(optimizer)

    calls: list[Any] = []
    inner = Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    fill_state(build(inner, initialise))
    assert calls == [inner]


class PreciseAdam(torch.optim.Adam):
    """With the method of Transformer Engine 2's FusedAdam, which runs on a GPU alone."""

    store_param_remainders = True

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        dtype = torch.int16 if store_param_remainders else torch.float32
        self.state[param]["master_param"] = torch.zeros_like(param, dtype=dtype)


def test_the_precision_aware_adam_keeps_what_bf16_lacks() -> None:
    """Megatron calls it without the second argument: TypeError, at the start and at a load."""
    from megatron.mimo.training.optimizer_state import fill_state

    weights = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES]
    inner = PreciseAdam(weights, lr=0.1)

    def initialise(optimizer: Any, _: Any = None) -> None:
        optimizer.initialize_state(weights[0])

    optimizer = build(inner, initialise, use_precision_aware_optimizer=True)
    fill_state(optimizer)
    optimizer.init_state_fn(inner, optimizer.config)  # as a load calls it
    assert [inner.state[one]["master_param"].dtype for one in weights] == [
        torch.int16,
        torch.float32,
    ]
