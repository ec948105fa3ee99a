"""Self-attention whose cache holds rotated keys; S tokens of a step, B sequences, G key heads.

megatron-core's keeps keys as they come and rotates all of them again in every step of generation:
a pass over the cache, several times, for each token. Here a key is rotated once, as it is stored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention

__all__ = ["CachingSelfAttention"]


class CachingSelfAttention(SelfAttention):
    """megatron-core's ``SelfAttention``; the difference is where a static inference context is."""

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
