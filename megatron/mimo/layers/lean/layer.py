"""A transformer layer that computes a forward pass in a dozen calls, where that is all there is.

megatron-core's layer asks at every step for tensor parallelism, FP8, recomputation, offloading,
caches: some 2 ms of Python a layer beside 0.4 ms of kernels for a layer of a vision encoder on an
H200. Where none of it is in use the same weights are multiplied directly. Parameters stay where
they are, so that checkpoints, optimizers and the hooks on their gradients see no difference.

Legend: S sequence, B micro-batch, E hidden, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.mimo.layers.attention.self_attention import CachingSelfAttention
from megatron.mimo.layers.fused import rotate
from megatron.mimo.layers.layer_scale import ScaledAdd
from megatron.mimo.layers.lean.reading import Reading, read_layer

__all__ = ["LeanLayer"]

# What a lean pass takes; anything else that is not None is megatron-core's.
_TAKEN = frozenset(
    {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params", "padding_mask"}
)
_UNREAD = object()
_ENGINE = "TEDotProductAttention"


class LeanLayer(TransformerLayer):
    """megatron-core's layer; what it computes and holds is the same.

    A lean pass is taken in training and in evaluation without a cache, on one tensor-parallel rank,
    without dropout, where every part is one that :mod:`~megatron.mimo.layers.lean.reading` knows
    and nothing hangs on it (hooks, adapters). Everything else is megatron-core's.
    """

    self_attn_bda: Any
    mlp_bda: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._reading: Any = _UNREAD

    def forward(self, *arguments: Any, **given: Any) -> Any:
        """As megatron-core's: hidden states [S, B, E] and ``context``."""
        reading = None if arguments else self._lean_reading(given)
        if reading is None:
            return super().forward(*arguments, **given)
        reading.await_weights()
        hidden_SBE = self._attend(
            reading,
            given["hidden_states"],
            given.get("attention_mask"),
            given.get("rotary_pos_emb"),
            given.get("packed_seq_params"),
        )
        mlp = self.mlp
        inner = reading.act(_product(reading.second_norm(hidden_SBE), mlp.linear_fc1))
        return _add(hidden_SBE, _product(inner, mlp.linear_fc2), self.mlp_bda), None

    def _lean_reading(self, given: dict[str, Any]) -> Reading | None:
        """The layer as it can be computed now; None where megatron-core has to."""
        if self._reading is _UNREAD:
            self._reading = read_layer(self)
        reading: Reading | None = self._reading
        if reading is None or not reading.holds():
            return None
        if self.training and self.hidden_dropout > 0:
            return None
        for name, value in given.items():
            if value is not None and name not in _TAKEN:
                return None
        if given.get("rotary_pos_emb") is not None:
            attention = self.self_attention
            if type(attention) is not CachingSelfAttention or not attention.turns_itself:
                return None
        same = given["hidden_states"].dtype == self.mlp.linear_fc2.weight.dtype
        return reading if same else None

    def _attend(
        self, reading: Reading, hidden_SBE: Tensor, mask: Any, rotary: Tensor | None, packed: Any
    ) -> Tensor:
        attention = self.self_attention
        S, B, _ = hidden_SBE.shape
        D, G = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
        mixed = _product(reading.first_norm(hidden_SBE), attention.linear_qkv).view(S, B, G, -1)
        query, key, value = mixed.split((mixed.size(-1) - 2 * D, D, D), dim=-1)
        query = query.reshape(S, B, -1, D)
        if attention.q_layernorm is not None:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        if rotary is not None:
            turns, scale = attention.turns(rotary, packed, S)
            query, key = rotate(query, key, turns, scale=scale)
        if packed is not None and packed.qkv_format == "thd":
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if rotary is not None and type(attention.core_attention).__name__ == _ENGINE:
            value = value.contiguous()  # else it looks twice at strides, and copies all three
        out = attention.core_attention(
            query,
            key,
            value,
            mask,
            attn_mask_type=attention.attn_mask_type,
            packed_seq_params=packed,
        )
        added = _product_of(out.reshape(S, B, -1), attention.linear_proj)
        return _add(hidden_SBE, added, self.self_attn_bda)


def _product(hidden: Tensor, linear: Any) -> Tensor:
    bias = linear.bias
    # Transformer Engine has an empty tensor where there is no bias.
    return F.linear(hidden, linear.weight, bias if bias is not None and bias.numel() else None)


def _product_of(out_SBE: Tensor, linear: Any) -> Tensor:
    """The same; a fused attention may leave samples behind each other, [B, S, E] in memory."""
    if out_SBE.is_contiguous() or not out_SBE.transpose(0, 1).is_contiguous():
        return _product(out_SBE, linear)
    return _product(out_SBE.transpose(0, 1), linear).transpose(0, 1)


def _add(residual: Tensor, added: Tensor, how: Any) -> Tensor:
    if type(how) is ScaledAdd:
        return torch.addcmul(residual, added, how.scale)
    return residual + added
