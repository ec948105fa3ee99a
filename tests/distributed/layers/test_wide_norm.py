"""RMSNorm over all heads: on ranks that hold some of them it is what one process computes."""

from __future__ import annotations

from typing import Any

import torch

from tests.rank_pool import RankPool, model_parallel

HEADS, SIZE, EPSILON = 4, 3, 0.01


def _formula(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = heads.flatten(-2)
    mean = wide.square().mean(dim=-1, keepdim=True)
    return (wide / (mean + EPSILON).sqrt() * weight).view_as(heads)


def compare() -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers.wide_norm import WideNorm

    ranks = torch.distributed.get_world_size()
    model_parallel(tp=ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    norm = WideNorm(config=config, hidden_size=SIZE, eps=EPSILON, tp_group=group)
    torch.manual_seed(1)
    heads, upstream = torch.randn(2, 5, 2, HEADS, SIZE)
    weight = torch.randn(HEADS * SIZE)

    def mine(whole: Any, dim: int) -> Any:
        return whole.chunk(ranks, dim=dim)[group.rank()]

    with torch.no_grad():
        norm.weight.copy_(mine(weight, 0))
    given, wanted = mine(heads, 2).clone().requires_grad_(), heads.clone().requires_grad_()
    scale = weight.clone().requires_grad_()
    got, want = norm(given), _formula(wanted, scale)
    torch.testing.assert_close(got, mine(want, 2))
    got.backward(mine(upstream, 2))
    want.backward(upstream)
    assert wanted.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(given.grad, mine(wanted.grad, 2))
    torch.testing.assert_close(norm.weight.grad, mine(scale.grad, 0))
    [(key, sharded)] = norm.sharded_state_dict(prefix="norm.").items()
    assert (key, tuple(sharded.global_shape)) == ("norm.weight", (HEADS * SIZE,))
    assert sharded.global_offset == (group.rank() * HEADS * SIZE // ranks,)


def test_equals_the_formula(ranks: RankPool) -> None:
    ranks(1)(compare)
    ranks(2)(compare)
