"""Self-attention whose cache holds rotated keys; S tokens of a step, B sequences, G key heads.

megatron-core's keeps keys as they come and rotates all of them again in every step of generation:
a pass over the cache, several times, for each token. Here a key is rotated once, as it is stored.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.mimo.layers.traits import LayerTraits

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
        self._rotary_kinds = traits.rotary_kinds
        self._rotary_kind = traits.kind_of_layer(layer_number - 1)
        factor = traits.factor_of_layer(layer_number - 1)
        self._yarn_concentration_factor = factor * self._yarn_concentration_factor

    def forward(
        self, hidden_states: Tensor, *arguments: Any, rotary_pos_emb: Any = None, **named: Any
    ) -> Any:
        """As megatron-core's; of ``rotary_pos_emb`` [S, 1, 1, kinds * D], the layer's own kind."""
        if self._rotary_kinds > 1 and rotary_pos_emb is not None:
            parts = rotary_pos_emb.chunk(self._rotary_kinds, dim=-1)
            rotary_pos_emb = parts[self._rotary_kind].contiguous()
        return super().forward(hidden_states, *arguments, rotary_pos_emb=rotary_pos_emb, **named)

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
        """Rotate queries and keys [S, B, heads, D] of this step, then store keys and values."""
        rotates = (
            inference_context is not None
            and inference_context.is_static_batching()
            and rotary_pos_emb is not None
            and not self.config.flash_decode
        )
        if rotates:
            start = inference_context.sequence_len_offset
            query, key = (
                apply_rotary_pos_emb(
                    tensor,
                    angles[start : start + tensor.size(0)],
                    config=self.config,
                    mscale=self._yarn_concentration_factor,
                    cp_group=self.pg_collection.cp,
                )
                for tensor, angles in zip((query, key), rotary_pos_emb, strict=True)
            )
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *rest, **named
        )
