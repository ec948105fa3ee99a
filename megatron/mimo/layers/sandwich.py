"""Layers with norms on both sides of attention and feed-forward, as Gemma's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.mimo.layers.norm import Norm

__all__ = ["SandwichLayer"]


class SandwichLayer(TransformerLayer):
    """megatron-core's layer; what attention and feed-forward add to the residual is normed."""

    self_attn_bda: Any
    mlp_bda: Any

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        norms = [Norm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2)]
        self.post_self_attn_layernorm, self.post_mlp_layernorm = norms
        self.self_attn_bda = _normed(self.self_attn_bda, self.post_self_attn_layernorm)
        self.mlp_bda = _normed(self.mlp_bda, self.post_mlp_layernorm)


def _normed(add: Callable[..., Any], norm: nn.Module) -> Callable[..., Any]:
    """Megatron's bias-dropout-add, of what ``norm`` makes of output and bias."""

    def get(training: bool, fused: bool) -> Callable[..., Tensor]:
        added = add(training, fused)

        def add_normed(
            output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            output, bias = output_and_bias
            output = output if bias is None else output + bias
            result: Tensor = added((norm(output), None), residual, dropout)
            return result

        return add_normed

    return get
