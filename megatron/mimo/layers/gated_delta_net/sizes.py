"""Sizes of a gated delta net, and the cut of its projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Sizes", "Streams"]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What a token's projection holds, by key heads.

    Attributes:
        convolved: [..., G, 2 K + R V]: query, key and values, before or after the convolution.
        gate: [..., G, R, V], of the output.
        strength: [..., G, R], logits.
        decay: [..., G, R], before the softplus.
    """

    convolved: Tensor
    gate: Tensor
    strength: Tensor
    decay: Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the whole layer, over all ranks.

    Attributes:
        key_heads: G.
        values_per_key: R, value heads that share a key head.
        key: K, size of a key (and query).
        value: V, size of a value.
        taps: of the convolution.
    """

    key_heads: int
    values_per_key: int
    key: int
    value: int
    taps: int

    @classmethod
    def of(cls, config: TransformerConfig) -> Sizes:
        """From the fields ``linear_*``.

        Raises:
            ConfigError: one is missing or below 1, or the heads do not fit each other or the ranks
                of tensor times context parallelism.
        """
        names = (
            *("linear_num_key_heads", "linear_num_value_heads"),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
        )
        values = {name: getattr(config, name) for name in names}
        for name, number in values.items():
            if number is None or number < 1:
                raise ConfigError(f"{name} is {number}; a gated delta net needs at least 1")
        keys, heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
        if heads % keys:
            raise ConfigError(
                f"linear_num_value_heads is {heads}; expected a multiple of linear_num_key_heads = "
                f"{keys}"
            )
        tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
        if keys % (tp * cp):
            raise ConfigError(
                f"linear_num_key_heads is {keys}; expected a multiple of tensor times context "
                f"parallelism, {tp} * {cp}: every rank computes heads of its own"
            )
        return cls(
            key_heads=keys,
            values_per_key=heads // keys,
            key=values["linear_key_head_dim"],
            value=values["linear_value_head_dim"],
            taps=values["linear_conv_kernel_dim"],
        )

    @property
    def value_heads(self) -> int:
        """H."""
        return self.key_heads * self.values_per_key

    @property
    def convolved(self) -> int:
        """Channels of one key head's group that the convolution takes: query, key, values."""
        return 2 * self.key + self.values_per_key * self.value

    @property
    def projected(self) -> int:
        """Rows of one key head's group in the projection: besides, gate, strength and decay."""
        return self.convolved + self.values_per_key * (self.value + 2)

    @property
    def operations_per_token(self) -> int:
        """FLOPs of the rule: the state of each head is multiplied with three vectors.

        What the recurrence needs, whatever way it is computed: reading by the key, correcting,
        reading by the query. Scaling and the gates are left out.
        """
        return 3 * 2 * self.value_heads * self.key * self.value

    def split(self, projected: Tensor) -> Streams:
        """A rank's projection [..., G_local * ``projected``], without a copy."""
        R, V = self.values_per_key, self.value
        by_group = projected.unflatten(-1, (-1, self.projected))
        convolved, gate, strength, decay = by_group.split([self.convolved, R * V, R, R], dim=-1)
        return Streams(
            convolved=convolved,
            gate=gate.unflatten(-1, (R, V)),
            strength=strength,
            decay=decay,
        )

    def heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [..., G, K] and values [..., G, R, V]."""
        R, V = self.values_per_key, self.value
        q, k, v = convolved.split([self.key, self.key, R * V], dim=-1)
        return q, k, v.unflatten(-1, (R, V))
