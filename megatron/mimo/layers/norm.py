"""LayerNorm and RMSNorm on torch alone, for layers that are built without Transformer Engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["Kind", "Norm", "normed", "widened"]


class Kind(NamedTuple):
    """What a norm computes.

    Attributes:
        eps: added under the root.
        rms: RMSNorm; else LayerNorm.
        zero_centered: whether the weight is what is added to 1.
    """

    eps: float
    rms: bool
    zero_centered: bool = False


class Norm(nn.Module):
    """The norm that ``config.normalization`` names; takes the place of a norm in a layer spec.

    "LayerNorm" is ``(x - mean) / sqrt(variance + eps) * weight + bias``, "RMSNorm" is
    ``x / sqrt(mean(x^2) + eps) * weight``, both over the last dimension.

    Unlike ``torch.nn``'s it works under sequence parallelism: each tensor-parallel rank normalises
    its own part of the sequence, so that the replicated weight gets a part of its gradient on each,
    and the attribute ``sequence_parallel`` makes ``finalize_model_grads`` sum the parts.

    ``config.persist_layer_norm`` names a kernel of apex for the same result: torch picks its own.

    Args:
        config: of the layer.
        hidden_size: size of the last dimension.
        eps: added under the root; ``config.layernorm_epsilon`` by default.

    Attributes:
        weight: [hidden_size], in ``config.params_dtype``. With
            ``config.layernorm_zero_centered_gamma`` it is what is added to 1.
        bias: [hidden_size], or None for RMSNorm.

    Raises:
        ConfigError: another normalisation, or ``memory_efficient_layer_norm``.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float | None = None
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ConfigError(
                f"normalization is {config.normalization!r}; expected 'LayerNorm' or 'RMSNorm'"
            )
        if config.memory_efficient_layer_norm:
            raise ConfigError(
                "memory_efficient_layer_norm=True needs apex's or Transformer Engine's norms, "
                "which are not in use; leave it out"
            )
        self.normalization = config.normalization
        self.shape = (hidden_size,)
        self.kind = Kind(
            eps=config.layernorm_epsilon if eps is None else eps,
            rms=config.normalization == "RMSNorm",
            zero_centered=config.layernorm_zero_centered_gamma,
        )
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype))
            if self.normalization == "LayerNorm"
            else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the norm scale by one and shift by nothing."""
        nn.init.constant_(self.weight, 0.0 if self.kind.zero_centered else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises over the last dimension.

        Args:
            hidden: [..., hidden_size]; may be wider than the weight (an fp32 residual stream).

        Returns:
            The same shape, in the weight's dtype. Sums are taken in fp32.
        """
        result = normed(hidden, self.weight, self.bias, self.kind)
        return result.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.normalization}, {self.shape[0]}, eps={self.kind.eps}"


def normed(hidden: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
    """The norm over the last dimension, in the widest dtype of what is given; see :class:`Norm`."""
    if kind.zero_centered or hidden.dtype != weight.dtype:
        hidden, weight, bias = widened(hidden, weight, bias, kind)
    if kind.rms:
        return F.rms_norm(hidden, weight.shape, weight, kind.eps)
    return torch.layer_norm(hidden, weight.shape, weight, bias, kind.eps)


def widened(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a norm is computed of, in one dtype that holds them; 1 + a zero-centred weight."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if kind.zero_centered:  # in bf16, 1 + weight would lose the weight's low bits
        dtype = torch.promote_types(dtype, torch.float32)
    weight = weight.to(dtype) + 1 if kind.zero_centered else weight.to(dtype)
    return hidden.to(dtype), weight, None if bias is None else bias.to(dtype)
