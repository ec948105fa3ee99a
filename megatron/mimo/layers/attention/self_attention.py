"""Self-attention that turns queries and keys in one launch, and whose cache holds turned keys.

megatron-core's turns queries and keys of a packed row document by document, and keeps the keys of
a cache as they come, to turn all of them again in every step of generation: a pass over the cache,
several times, for each token. Here a key is turned once, as it is stored.

Legend: S tokens of a step, B sequences, G key heads, D head size.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers.fused import rotate
from megatron.mimo.layers.traits import LayerTraits
from megatron.mimo.layers.turns import turns_of

__all__ = ["CachingSelfAttention"]


class CachingSelfAttention(SelfAttention):
    """megatron-core's ``SelfAttention`` with the traits of a layer and another cache.

    Args:
        config: of the layer.
        layer_number: from 1, over the whole model.
        traits: of the layers.
        named: SelfAttention's other arguments.
    """

    _yarn_concentration_factor: float

    def __init__(
        self, config: TransformerConfig, *, layer_number: int, traits: LayerTraits, **named: Any
    ) -> None:
        if traits.output_bias is not None and traits.output_bias != config.add_bias_linear:
            config = copy.copy(config)  # whose biases are those of the feed-forward
            config.add_bias_linear = traits.output_bias
        super().__init__(config=config, layer_number=layer_number, **named)
        self.rotary_kinds = traits.rotary_kinds
        self._rotary_kind = traits.kind_of_layer(layer_number - 1)
        factor = traits.factor_of_layer(layer_number - 1)
        self._yarn_concentration_factor = factor * self._yarn_concentration_factor
        # Neighbouring features that turn together, and flash decoding, are megatron-core's.
        self.turns_itself = not config.rotary_interleaved and not config.flash_decode
        self.is_given_turns = False

    def forward(
        self,
        hidden_states: Tensor,
        *arguments: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **named: Any,
    ) -> Any:
        """As megatron-core's; of ``rotary_pos_emb`` [S, 1, 1, kinds * D], the layer's own kind."""
        if rotary_pos_emb is not None and not self.turns_itself:
            parts = rotary_pos_emb.chunk(self.rotary_kinds, dim=-1)
            rotary_pos_emb = parts[self._rotary_kind].contiguous()
        elif rotary_pos_emb is not None and not self.is_given_turns:
            share = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            rotary_pos_emb = self._made_turns(
                rotary_pos_emb, packed_seq_params, hidden_states.size(0) * share
            )
        return super().forward(
            hidden_states,
            *arguments,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **named,
        )

    def turns(
        self, rotary: Tensor, packed: PackedSeqParams | None, tokens: int
    ) -> tuple[Tensor, float]:
        """What :func:`~megatron.mimo.layers.fused.rotate` takes: turns of tokens, and a factor.

        Args:
            rotary: what the layer is called with.
            packed: where documents of a packed row begin and end.
            tokens: of this rank, of a packed row.
        """
        if not self.is_given_turns:
            rotary = self._made_turns(rotary, packed, tokens)
        return self._own(rotary), self._yarn_concentration_factor

    def _made_turns(self, angles: Tensor, packed: PackedSeqParams | None, tokens: int) -> Tensor:
        return turns_of(
            angles,
            packed,
            tokens=tokens,
            kinds=self.rotary_kinds,
            cp_group=self.pg_collection.cp,
        )

    def _own(self, turns: Tensor) -> Tensor:
        """Of turns [S, B or 1, 1, kinds * D], those of the layer's kind: [S * B or S, D]."""
        rows = turns.flatten(0, -2)
        return rows.chunk(self.rotary_kinds, dim=-1)[self._rotary_kind]

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        """Turn queries and keys [S, B, heads, D] of this step, then store keys and values."""
        is_static = inference_context is None or inference_context.is_static_batching()
        if rotary_pos_emb is not None and self.turns_itself and is_static:
            turns = rotary_pos_emb[0]
            if inference_context is not None:
                start = inference_context.sequence_len_offset
                turns = turns[start : start + query.size(0)]
            scale = self._yarn_concentration_factor
            query, key = rotate(query, key, self._own(turns), scale=scale)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *rest, **named
        )
