"""The norms of a layer as their weights, and each with the addition before it.

Legend: T vectors, E hidden.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megatron.core.transformer.identity_op import IdentityOp
from megatron.mimo.layers.fused import add_norm
from megatron.mimo.layers.fused.operators import has_triton
from megatron.mimo.layers.layer_scale import ScaledAdd
from megatron.mimo.layers.norm import Kind, Norm, normed

__all__ = [
    "AddNorm",
    "Addition",
    "Function",
    "addition",
    "called",
    "is_norm",
    "known_norm",
    "with_norm",
]

Function = Callable[[Tensor], Tensor]
Addition = Callable[[Tensor, Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

_ENGINE_NORM = {"RMSNorm", "LayerNorm"}  # Transformer Engine's classes: it may be absent


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownNorm:
    """A norm by its parameters: those of a module, where others may take their place.

    Attributes:
        parameters: of the module.
        weight, bias: their names.
        kind: what it computes.
    """

    parameters: dict[str, Any]
    weight: str
    bias: str
    kind: Kind

    def __call__(self, hidden: Tensor) -> Tensor:
        """The norm over the last dimension, in the dtype of ``hidden``."""
        parameters = self.parameters
        weight, bias = parameters[self.weight], parameters.get(self.bias)
        result = normed(hidden, weight, bias, self.kind)
        return result if result.dtype == hidden.dtype else result.to(hidden.dtype)


def known_norm(norm: Any, linear: Any) -> Function | None:
    """The norm before a product: a module's, or that of the linear layer that has it in itself."""
    fused = getattr(linear, "layer_norm_weight", None) is not None
    if fused == (not isinstance(norm, IdentityOp)):
        return None
    if fused:
        return KnownNorm(
            parameters=linear._parameters,
            weight="layer_norm_weight",
            bias="layer_norm_bias",
            kind=Kind(linear.eps, linear.normalization == "RMSNorm", linear.zero_centered_gamma),
        )
    return called(norm) if is_norm(norm) else None


def is_norm(norm: Any) -> bool:
    """Whether a module is a norm that is known."""
    kind = type(norm)
    is_engine = kind.__name__ in _ENGINE_NORM and kind.__module__.startswith("transformer_engine")
    return kind is Norm or is_engine


def called(norm: Any) -> Function:
    """What a module computes, without calling it where that is one function."""
    if type(norm) is not Norm:
        return cast(Function, norm)
    return KnownNorm(
        parameters=norm._parameters,
        weight="weight",
        bias="bias",
        kind=norm.kind,
    )


def addition(how: Any) -> Addition:
    """What adds to a residual, of a layer's ``bda``."""
    return partial(_scaled, how._parameters) if type(how) is ScaledAdd else operator.add


def _scaled(parameters: Mapping[str, Any], residual: Tensor, added: Tensor) -> Tensor:
    return torch.addcmul(residual, added, parameters["scale"])


def with_norm(add: Addition, norm: Function) -> AddNorm:
    """What is added to a residual, or nothing, and the norm of that: both as vectors [T, E].

    On a GPU in one operation to autograd, so that its gradient is made in one launch.
    """
    if isinstance(norm, KnownNorm) and _on_a_gpu(norm):
        return partial(_in_one, None if add is operator.add else add, norm)
    return partial(_apart, add, norm)


def _on_a_gpu(norm: KnownNorm) -> bool:
    weight: Tensor = norm.parameters[norm.weight]
    return weight.is_cuda and has_triton()


def _in_one(
    add: Addition | None, norm: KnownNorm, residual: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    if add is not None and added is not None:
        residual, added = add(_as(residual, added), added), None
    parameters = norm.parameters
    weight, bias = parameters[norm.weight], parameters.get(norm.bias)
    return add_norm(residual, added, weight, bias, norm.kind)


def _apart(
    add: Addition, norm: Function, residual: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    if added is not None:
        residual = add(_as(residual, added), added)
    total_TE = residual if residual.dim() == 2 else residual.reshape(-1, residual.size(-1))
    return total_TE, norm(total_TE)


def _as(residual: Tensor, added: Tensor) -> Tensor:
    return residual if residual.dim() == added.dim() else residual.view(added.shape)
