"""Layer scale, against the formula."""

from __future__ import annotations

import torch

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers.layer_scale import ScaledAdd


def scaled(dtype: torch.dtype = torch.float32) -> ScaledAdd:
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, params_dtype=dtype
    )
    return ScaledAdd(config, 0.5)


def test_scales_output_and_bias_and_adds_the_residual() -> None:
    module = scaled()
    assert module.scale.tolist() == [0.5] * 4
    with torch.no_grad():
        module.scale.copy_(torch.tensor([1.0, 2.0, 3.0, -1.0]))
    hidden, bias, residual = torch.randn(3, 2, 4), torch.randn(4), torch.randn(3, 2, 4)
    got = module(training=True, fused=True)((hidden, bias), residual, 0.0)
    torch.testing.assert_close(got, residual + (hidden + bias) * torch.tensor([1.0, 2, 3, -1]))
    got = module(training=False, fused=False)((hidden, None), residual, 0.9)
    torch.testing.assert_close(got, residual + hidden * torch.tensor([1.0, 2, 3, -1]))


def test_dropout_drops_in_training() -> None:
    add = scaled()(training=True, fused=False)
    ones = torch.ones(1000, 1, 4)
    dropped = add((ones, None), torch.zeros_like(ones), 0.5)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}  # scaled by 0.5, kept twice as large
    assert 0.4 < (dropped == 0).float().mean().item() < 0.6


def test_keeps_a_wide_residual() -> None:
    half = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    got = scaled(torch.bfloat16)(training=True, fused=False)((half, None), half.float(), 0.0)
    assert got.dtype == torch.float32
