"""One token at a time: the recurrence itself, and what the convolution remembers.

Legend: B sequences, T tokens of a step, G key heads, R value heads of each, F channels of a group,
J taps of the convolution, K size of a key, V size of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.mimo.layers.gated_delta_net.delta_rule import unit_length

__all__ = ["delta_step", "last_inputs"]


def delta_step(
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BGRV: Tensor,
    decay_BGR: Tensor,
    strength_BGR: Tensor,
    state_BGRKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule for one token of each sequence.

    Arguments are those of ``gated_delta_rule`` without tokens.

    Returns:
        The output [B, G, R, V] in the values' dtype, and the next state.
    """
    wide = state_BGRKV.dtype
    q, k = (unit_length(x.to(wide))[:, :, None, None] for x in (q_BGK, k_BGK))  # [B, G, 1, 1, K]
    state = state_BGRKV * decay_BGR.to(wide).exp()[..., None, None]
    missing_BGRV = v_BGRV.to(wide) - (k @ state).squeeze(-2)
    correction_BGRV = strength_BGR.to(wide).unsqueeze(-1) * missing_BGRV
    state = state + k.mT * correction_BGRV.unsqueeze(-2)
    out_BGRV = (q @ state).squeeze(-2) * q.size(-1) ** -0.5
    return out_BGRV.to(v_BGRV.dtype), state


def last_inputs(x_BTGF: Tensor, history_BJGF: Tensor, padding_BT: Tensor | None) -> Tensor:
    """What the convolution of the next step has to know: each sequence's last J - 1 tokens.

    Args:
        x_BTGF: what the convolution read in this step.
        history_BJGF: the J - 1 tokens before.
        padding_BT: bool, True where a token is none; before or behind a sequence's tokens, not
            among them. None for none.
    """
    taps = history_BJGF.size(1)
    extended = torch.cat([history_BJGF, x_BTGF], dim=1)
    if padding_BT is None:
        return extended[:, extended.size(1) - taps :].clone()
    T = x_BTGF.size(1)
    place_T = torch.arange(1, T + 1, device=padding_BT.device)
    end_B = torch.where(padding_BT, 0, place_T).amax(dim=1)
    # The tokens [end - taps, end) of the step lie at [end, end + taps) behind the history.
    index_BJ = end_B[:, None] + torch.arange(taps, device=padding_BT.device)
    return extended.take_along_dim(index_BJ[:, :, None, None], dim=1)
