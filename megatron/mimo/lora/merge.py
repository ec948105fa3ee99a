"""Adapters as tensors: names beside their weight, and the sum of both.

Legend: O output features, I input features, R rank.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["adapter_names", "is_adapter", "merge_adapter", "weight_name"]

_DOWN, _UP = "adapter.down", "adapter.up"
_WEIGHT = "weight"


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of the two halves of the adapter of a weight: ``down`` [R, I] and ``up`` [O, R]."""
    layer = weight.removesuffix(_WEIGHT)
    return layer + _DOWN, layer + _UP


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of half an adapter."""
    return name.endswith((f".{_DOWN}", f".{_UP}"))


def weight_name(half: str) -> str:
    """The name of the weight that half an adapter belongs to."""
    assert is_adapter(half), half
    return half.removesuffix(_DOWN).removesuffix(_UP) + _WEIGHT


def merge_adapter(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """``weight + scale * up @ down`` [O, I], computed in fp32, in the weight's dtype.

    Exact on parts too: rows of ``weight`` with the same rows of ``up``, columns with the same
    columns of ``down``.
    """
    merged_OI = weight_OI.float() + scale * (up_OR.float() @ down_RI.float())
    return merged_OI.to(weight_OI.dtype)
