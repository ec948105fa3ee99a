"""A transformer layer that computes a forward pass in a dozen calls, where that is all there is.

megatron-core's layer asks at every step for tensor parallelism, FP8, recomputation, offloading,
caches: some 2 ms of Python a layer beside 0.4 ms of kernels for a layer of a vision encoder on an
H200. Where none of it is in use the same weights are multiplied directly. Parameters stay where
they are, so that checkpoints, optimizers and the hooks on their gradients see no difference.

Legend: S sequence, B micro-batch, T = S * B vectors, E hidden, F features between the linear layers
of the feed-forward, H query heads, G key heads, D head size, W what is projected for a key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.mimo.layers.attention.self_attention import CachingSelfAttention
from megatron.mimo.layers.fused import rotate, turn_heads
from megatron.mimo.layers.lean.reading import Reading, read_layer

__all__ = ["LeanLayer"]

# What a lean pass takes; anything else that is not None is megatron-core's.
_TAKEN = frozenset(
    {"hidden_states", "attention_mask", "rotary_pos_emb", "packed_seq_params", "padding_mask"}
)
_UNREAD = object()
_shaped = torch.ops.aten._unsafe_view.default


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

    def __call__(self, *arguments: Any, **given: Any) -> Any:
        """As megatron-core's, which asks four times for CUDA graphs that were never made."""
        if self.config.cuda_graph_impl == "none":
            return nn.Module.__call__(self, *arguments, **given)
        return super().__call__(*arguments, **given)

    def forward(self, *arguments: Any, **given: Any) -> Any:
        """As megatron-core's: hidden states [S, B, E] and ``context``."""
        reading = None if arguments else self._lean_reading(given)
        if reading is None:
            return super().forward(*arguments, **given)
        reading.await_weights()
        hidden_SBE = given["hidden_states"]
        hidden_TE, normed_TE = reading.first_norm(hidden_SBE, None)
        attended = self._attend(
            reading,
            normed_TE,
            hidden_SBE.shape,
            given.get("attention_mask"),
            given.get("rotary_pos_emb"),
            given.get("packed_seq_params"),
        )
        hidden_TE, normed_TE = reading.second_norm(hidden_TE, attended)
        first, second = reading.mlp
        # Not a view to autograd: a pipeline stage frees its output once it is sent.
        out_TE = reading.add(hidden_TE, second(reading.act(first(normed_TE))))
        return _shaped(out_TE, hidden_SBE.shape), None

    @property
    def is_lean(self) -> bool:
        """Whether its weights are multiplied directly, by what is known before it is called."""
        if self._reading is _UNREAD:
            self._reading = read_layer(self)
        reading: Reading | None = self._reading
        if reading is None or not reading.holds():
            return False
        return not self.training or self.hidden_dropout == 0

    def _lean_reading(self, given: dict[str, Any]) -> Reading | None:
        """The layer as it can be computed now; None where megatron-core has to."""
        if not self.is_lean:
            return None
        for name, value in given.items():
            if value is not None and name not in _TAKEN:
                return None
        reading: Reading = self._reading
        if given.get("rotary_pos_emb") is not None:
            attention = reading.attention
            if type(attention) is not CachingSelfAttention or not attention.turns_itself:
                return None
        same = given["hidden_states"].dtype == reading.proj.weight.dtype
        return reading if same else None

    def _attend(
        self,
        reading: Reading,
        normed_TE: Tensor,
        shape: torch.Size,
        mask: Any,
        rotary: Tensor | None,
        packed: Any,
    ) -> Tensor:
        """What is added to the residual: [T, E], or [S, B, E] where that is no copy."""
        attention, (G, D) = reading.attention, reading.sizes
        S, B, _ = shape
        rows = (S * B,) if packed is not None and packed.qkv_format == "thd" else (S, B)
        mixed = reading.qkv(normed_TE).view(*rows, G, -1)
        turns = None if rotary is None else attention.turns(rotary, packed, S)
        query, key, value = _heads(mixed, D, turns, reading.head_norms)
        out = reading.attend(
            query,
            key,
            value,
            mask,
            attn_mask_type=attention.attn_mask_type,
            packed_seq_params=packed,
        )
        if packed is not None or out.is_contiguous():
            return reading.proj(out.reshape(S * B, -1))
        # A fused attention may leave samples behind each other, [B, S, E] in memory.
        return reading.proj(out.transpose(0, 1).reshape(S * B, -1)).view(B, S, -1).transpose(0, 1)


def _heads(
    mixed: Tensor, D: int, turns: tuple[Tensor, float] | None, norms: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of [..., G, W], queries [..., H, D], keys and values [..., G, D]."""
    if turns is not None and not norms:
        return turn_heads(mixed, turns[0], D, scale=turns[1])
    *rows, _, W = mixed.shape
    query, key, value = torch.split_with_sizes(mixed, (W - 2 * D, D, D), dim=-1)
    if W > 3 * D:
        query = query.reshape(*rows, -1, D)
    if norms:
        query, key = norms[0](query), norms[1](key)
        if turns is not None:
            query, key = rotate(query, key, turns[0], scale=turns[1])
    return query, key, value
