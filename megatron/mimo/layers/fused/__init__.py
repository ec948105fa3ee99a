"""What stands between a layer's products of matrices, each in one launch of a kernel."""

from megatron.mimo.layers.fused.activation import KINDS, activate
from megatron.mimo.layers.fused.norm import add_norm
from megatron.mimo.layers.fused.rotation import rotate, turn_heads

__all__ = ["KINDS", "activate", "add_norm", "rotate", "turn_heads"]
