"""Keeps fp32 exact: no TF32, which rounds the factors of fp32 products to 10 bits on CUDA."""

from __future__ import annotations

import os

import torch

__all__ = ["forbid_tf32"]


def forbid_tf32() -> None:
    """Compute fp32 products in fp32, from here to the end of the process and in its children.

    Torch's switches reach torch's own products; Transformer Engine asks cuBLAS for TF32 by itself,
    and only the environment overrules that. CUDA's libraries read it when they start: call this
    before anything is computed on a GPU.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
