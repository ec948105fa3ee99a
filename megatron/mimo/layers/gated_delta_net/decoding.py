"""One token at a time: the recurrence itself, and what the convolution remembers.

Legend: B sequences, S tokens of a step, G key heads, R value heads of each, F channels of a group,
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


def last_inputs(x_SBGF: Tensor, history_JBGF: Tensor, padding_SB: Tensor | None) -> Tensor:
    """What the convolution of the next step has to know: each sequence's last J - 1 tokens.

    Args:
        x_SBGF: what the convolution read in this step.
        history_JBGF: the J - 1 tokens before.
        padding_SB: bool, True where a token is none; before or behind a sequence's tokens, not
            among them. None for none.
    """
    taps = len(history_JBGF)
    extended = torch.cat([history_JBGF, x_SBGF])
    if padding_SB is None:
        return extended[len(extended) - taps :].clone()
    place_S1 = torch.arange(1, len(x_SBGF) + 1, device=padding_SB.device)[:, None]
    end_B = torch.where(padding_SB, 0, place_S1).amax(dim=0)
    # The tokens [end - taps, end) of the step lie at [end, end + taps) behind the history.
    index_JB = end_B + torch.arange(taps, device=padding_SB.device)[:, None]
    return extended.take_along_dim(index_JB[:, :, None, None], dim=0)
