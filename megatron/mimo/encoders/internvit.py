"""The layers of InternViT, the image encoder of InternVL: :class:`ClipEncoder` is built of them.

Its smaller size has LayerNorm and biases; its larger one RMSNorm, queries and keys that are normed
over all heads together, and projections without biases. Both scale what each layer adds.

Legend: S sequence, B batch, H heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers import encoder_layer_spec
from megatron.mimo.layers.layer_scale import ScaledAdd
from megatron.mimo.layers.wide_norm import WideNorm

__all__ = ["NormedAttention", "internvit_layer_spec"]

_EPSILON = 1e-6  # of the norms of queries and keys, whatever that of the others is


def internvit_layer_spec(
    config: TransformerConfig,
    *,
    initial_scale: float,
    qkv_bias: bool,
    qk_norm: bool,
    tp_group: torch.distributed.ProcessGroup,
) -> ModuleSpec:
    """The layers, and the norm behind the last.

    Args:
        config: of the encoder.
        initial_scale: what the scales of a layer begin with.
        qkv_bias: projections of queries, keys and values have biases.
        qk_norm: queries and keys are normed.
        tp_group: its heads are spread over.

    Raises:
        ConfigError: see :func:`encoder_layer_spec`.
    """
    block = encoder_layer_spec(config)
    scaled = ModuleSpec(module=ScaledAdd, params={"config": config, "initial": initial_scale})
    for layer in {id(one): one for one in block.submodules.layer_specs}.values():
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scaled
        attention = layer.submodules.self_attention.submodules
        if not qkv_bias:
            attention.linear_qkv = partial(_without_bias, attention.linear_qkv)
        if qk_norm:
            attention.core_attention = partial(
                NormedAttention, inner=attention.core_attention, tp_group=tp_group
            )
    return block


class NormedAttention(MegatronModule):
    """Norms queries and keys, then attends; takes the place of a layer's ``core_attention``.

    The norms are not called ``q_layernorm`` and ``k_layernorm``: Megatron sums the gradients of
    parameters of that name over the tensor-parallel group, and here each rank holds its own part.

    Args:
        config: of the encoder.
        inner: builds the attention that does the work.
        tp_group: the heads are spread over.
        given: passed on.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        inner: Callable[..., Any],
        tp_group: torch.distributed.ProcessGroup,
        **given: Any,
    ) -> None:
        super().__init__(config=config)
        self.q_norm, self.k_norm = (
            WideNorm(
                config=config,
                hidden_size=config.hidden_size // config.num_attention_heads,
                eps=_EPSILON,
                tp_group=tp_group,
            )
            for _ in range(2)
        )
        self.inner = inner(config=config, **given)

    def forward(self, query: Tensor, key: Tensor, *others: Any, **given: Any) -> Tensor:
        """Queries and keys [S, B, H, D], then what the attention takes."""
        out: Tensor = self.inner(self.q_norm(query), self.k_norm(key), *others, **given)
        return out


def _without_bias(linear: Callable[..., Any], *sizes: int, bias: bool, **given: Any) -> Any:
    """Build a linear layer without a bias, though Megatron's configuration asks for one.

    Megatron can leave out the bias of this projection only with those of all other linear layers.
    """
    del bias
    return linear(*sizes, bias=False, **given)
