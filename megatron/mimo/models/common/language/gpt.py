"""A GPTModel with the rotary embeddings, scales and caps that megatron-core's does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.language.expert_balance import BalancedPart, ExpertBalance
from megatron.mimo.layers.balanced_router import give_balance
from megatron.mimo.layers.rotary import Frequencies, RotaryAngles
from megatron.mimo.models.common.vocabulary import UnpaddedGPT

__all__ = ["LanguageGPT"]


class LanguageGPT(UnpaddedGPT):
    """The language model of a family.

    Args:
        rotary: kinds of frequencies; none for megatron-core's own.
        embedding_scale: what rows of the embedding are multiplied by.
        balance: of its experts, by a loss over all layers; None for no such loss.
        logit_cap: logits are bent to stay below it, ``cap * tanh(logits / cap)``; None for no cap.
        arguments: UnpaddedGPT's.

    Raises:
        ConfigError: a cap with a loss that is computed without logits.
    """

    def __init__(
        self,
        *,
        rotary: Sequence[Frequencies] = (),
        embedding_scale: float = 1.0,
        logit_cap: float | None = None,
        balance: BalancedPart | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        config = self.config
        self.expert_balance = None if balance is None else ExpertBalance(balance)
        if self.expert_balance is not None:
            give_balance(self, self.expert_balance)
        if rotary:
            self.rotary_pos_emb = RotaryAngles(
                rotary,
                kv_channels=config.kv_channels,
                rotary_percent=1.0,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
        if embedding_scale != 1.0 and self.pre_process:
            embeddings = self.embedding.word_embeddings
            embeddings.register_forward_hook(_Scale(embedding_scale, embeddings.weight.dtype))
        if logit_cap is not None and self.post_process:
            if config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "linear":
                raise ConfigError(
                    f"--cross-entropy-fusion-impl linear with a cap of {logit_cap} on logits: this "
                    "loss has no logits, which could be capped; use 'native' or 'te'"
                )
            self.output_layer.register_forward_hook(_Cap(logit_cap), prepend=True)


class _Scale:
    """A hook that multiplies by a number as the table's dtype has it."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        self.scale = torch.tensor(scale, dtype=dtype, device="cpu").item()

    def __call__(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * self.scale


@dataclass(frozen=True)
class _Cap:
    """A hook that caps logits."""

    cap: float

    def __call__(
        self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        logits_SBV, bias = output
        return torch.tanh(logits_SBV / self.cap) * self.cap, bias
