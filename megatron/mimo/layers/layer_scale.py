"""Layer scale: the output of attention, or of an MLP, times a learned vector, to the residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["ScaledAdd"]

Adding = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class ScaledAdd(nn.Module):
    """Takes the place of a ``self_attn_bda`` or ``mlp_bda`` in a layer spec.

    Args:
        config: of the layer.
        initial: what every element of the vector begins with.

    Attributes:
        scale: [hidden_size], in ``config.params_dtype``, replicated over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(
            torch.full((config.hidden_size,), initial, dtype=config.params_dtype)
        )

    def forward(self, training: bool, fused: bool) -> Adding:
        """As Megatron calls it: the function that adds.

        Args:
            training: whether dropout drops.
            fused: has no effect: there is no fused kernel for it.
        """
        del fused

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            hidden, bias = output
            hidden = hidden if bias is None else hidden + bias
            return residual + F.dropout(hidden * self.scale, prob, training)

        return add
