"""cuDNN's attention for encoders whose items have one size, where a GPU is faster with it.

On an H200 it takes 0.16 ms for eight images of 577 rows, forward and backward, and flash attention
0.27 ms. It is compiled for each number of items and of rows, 0.2 s each time: for rows of text,
whose lengths change from micro-batch to micro-batch, that would be the larger part of a step.

Legend: B items, H heads, S rows, D head size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["cudnn_attention", "prefers_cudnn"]

_SIZES: dict[tuple[object, ...], bool] = {}


def prefers_cudnn(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, dropout: float) -> bool:
    """Whether attention without a rule is to be cuDNN's: on Hopper and Blackwell, half precision.

    ``torch.backends.cuda.enable_cudnn_sdp(False)`` and deterministic algorithms turn it off.
    """
    if not q_BHSD.is_cuda or dropout > 0:
        return False
    if not torch.backends.cuda.cudnn_sdp_enabled() or torch.are_deterministic_algorithms_enabled():
        return False
    device = q_BHSD.get_device()
    tensors = (q_BHSD, k_BHSD, v_BHSD)
    key = (device, q_BHSD.dtype, *((one.shape, one.stride()) for one in tensors))
    known = _SIZES.get(key)
    if known is None:
        known = _SIZES[key] = q_BHSD.shape == k_BHSD.shape and _is_fast(device) and _fits(*tensors)
    return known


def cudnn_attention(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v: [B, H, S, D]."""
    with_gradient = torch.is_grad_enabled()
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHSD, k_BHSD, v_BHSD, None, with_gradient, scale=scale
    )[0]
    return out


@cache
def _is_fast(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _fits(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> bool:
    """Whether torch knows nothing against it."""
    asked = torch.backends.cuda.SDPAParams(q_BHSD, k_BHSD, v_BHSD, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(asked)
