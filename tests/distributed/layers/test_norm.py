"""A GPT with the project's norms: sequence parallelism over two ranks equals one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.tiny_gpt import build_gpt, next_token_loss
from tests.rank_pool import RankPool, model_parallel


def loss_and_gradients(tp: int, settings: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """One step's loss and, unsharded, the gradient of every parameter."""
    from megatron.core.distributed import finalize_model_grads

    model_parallel(tp=tp)
    model = build_gpt(tp, **settings)
    loss = next_token_loss(model, batch=3, seed=0)
    loss.backward()
    finalize_model_grads([model])
    gradients = {}
    for name, parameter in model.module.named_parameters():
        gradient = parameter.main_grad.clone()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(tp)]
            dist.all_gather(parts, gradient)
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        gradients[name] = gradient
    return loss.item(), gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"position_embedding": "learned_absolute", "layernorm_zero_centered_gamma": True},
        {"position_embedding": "rope", "normalization": "RMSNorm", "qk_layernorm": True},
    ],
    ids=["LayerNorm", "RMSNorm"],
)
def test_sequence_parallel_equals_one_process(ranks: RankPool, settings: dict[str, Any]) -> None:
    ((expected_loss, expected),) = ranks(1)(loss_and_gradients, 1, settings)
    norms = [name for name in expected if "layernorm" in name]
    assert len(norms) >= 5
    for loss, gradients in ranks(2)(loss_and_gradients, 2, settings):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
