"""What the layer does to its projections token by token: convolution, gates, gated norm.

Each keeps its inputs alone for the backward pass, and computes in fp32 (fp64 for fp64 inputs).

Legend: B rows, T tokens, G key heads, F channels of one key head's group, J taps of the
convolution, R value heads of a key head, V size of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.mimo.layers.gated_delta_net.recomputed import recomputed

__all__ = ["causal_convolution", "decay_of_gate", "gated_norm"]


def causal_convolution(
    x_BTGF: Tensor,
    weight_GFJ: Tensor,
    *,
    history_BJGF: Tensor | None = None,
    position_T: Tensor | None = None,
) -> Tensor:
    """silu(sum over taps j of weight[j] * x[t - (J - 1) + j]), each channel for itself.

    Args:
        x_BTGF: channels by groups.
        weight_GFJ: the last tap is the token's own.
        history_BJGF: the J - 1 tokens before the first; zeros by default.
        position_T: of each token in its document, in packed rows: taps end at its first token.

    Returns:
        [B, T, G, F] in x's dtype.
    """
    return recomputed(_convolve, x_BTGF, weight_GFJ, history_BJGF, position_T)


def _convolve(
    x_BTGF: Tensor, weight_GFJ: Tensor, history_BJGF: Tensor | None, position_T: Tensor | None
) -> Tensor:
    T, J = x_BTGF.size(1), weight_GFJ.size(-1)
    wide = torch.promote_types(x_BTGF.dtype, torch.float32)
    weight_JGF = weight_GFJ.to(wide).movedim(-1, 0)
    if history_BJGF is None:
        history_BJGF = x_BTGF.new_zeros(()).expand(x_BTGF.size(0), J - 1, *x_BTGF.shape[2:])
    extended = torch.cat([history_BJGF.to(x_BTGF.dtype), x_BTGF], dim=1)
    total = x_BTGF.to(wide) * weight_JGF[-1]
    for back in range(1, J):
        earlier = extended[:, J - 1 - back : J - 1 - back + T].to(wide)
        weight = weight_JGF[J - 1 - back]
        if position_T is not None:
            weight = weight * (position_T >= back)[:, None, None]
        total = torch.addcmul(total, earlier, weight)
    return F.silu(total).to(x_BTGF.dtype)


def decay_of_gate(a_BTGR: Tensor, A_log_GR: Tensor, dt_bias_GR: Tensor) -> Tensor:
    """Logarithm of what remains of the state at each token: -exp(A_log) softplus(a + dt_bias).

    Never in less than fp32: in fp16, exp(A_log) overflows.
    """
    return recomputed(_decay, a_BTGR, A_log_GR, dt_bias_GR)


def _decay(a_BTGR: Tensor, A_log_GR: Tensor, dt_bias_GR: Tensor) -> Tensor:
    wide = torch.promote_types(a_BTGR.dtype, torch.float32)
    return -A_log_GR.to(wide).exp() * F.softplus(a_BTGR.to(wide) + dt_bias_GR.to(wide))


def gated_norm(x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of each head's output, times the weight and silu(gate); in x's dtype."""
    return recomputed(_norm_and_gate, x_BTGRV, gate_BTGRV, weight_V, epsilon)


def _norm_and_gate(x_BTGRV: Tensor, gate_BTGRV: Tensor, weight_V: Tensor, epsilon: float) -> Tensor:
    wide = torch.promote_types(x_BTGRV.dtype, torch.float32)
    normed = F.rms_norm(x_BTGRV.to(wide), weight_V.shape, weight_V.to(wide), epsilon)
    return (normed * F.silu(gate_BTGRV.to(wide))).to(x_BTGRV.dtype)
