"""The settings that a language model is built of, as a typed value in place of flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["WHOLE_LOGITS", "LanguageSettings"]

WHOLE_LOGITS = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """The language model of a run, or of a model alone.

    Attributes:
        transformer: its layers, their parallel sizes and precision; the encoders' follow from it.
        tokens: size of the vocabulary.
        padded_tokens: the same with the padding that tensor parallelism needs; rows of the
            embedding.
        max_positions: the longest sequence, in tokens.
        position_embedding: "rope", "mrope", "learned_absolute" or "none".
        rotary_base: base of the rotary frequencies.
        rotary_percent: share of a head's channels that are rotated.
        rope_scaling_factor: factor of Llama 3's scaling; None without it.
        ties_output: the output layer is the embedding.
        whole_logits: bytes of fp32 logits of a micro-batch, on this rank, above which the loss is
            computed piece by piece.
        expert_balance: weight of the loss that balances experts over all layers; 0 for none.
    """

    transformer: TransformerConfig
    tokens: int
    padded_tokens: int
    max_positions: int
    position_embedding: str
    rotary_base: float
    rotary_percent: float
    rope_scaling_factor: float | None
    ties_output: bool
    whole_logits: int = WHOLE_LOGITS
    expert_balance: float = 0.0
