"""Attention without Transformer Engine, on PyTorch's fused kernels."""
