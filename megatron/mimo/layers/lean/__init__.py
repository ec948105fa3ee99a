"""Transformer layers whose forward pass is a dozen calls, where nothing asks for more."""

from megatron.mimo.layers.lean.layer import LeanLayer

__all__ = ["LeanLayer"]
