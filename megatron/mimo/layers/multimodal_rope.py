"""Interleaved multimodal RoPE: the axes of a position take turns among a head's frequencies.

Qwen2-VL gives each axis (time, height, width) a block of frequencies, which megatron-core has.
Qwen3-VL deals them out in turn, time, height, width, time ..., so that every axis has high and low
ones; what is left of the frequencies turns with time.

Legend: S sequence, B micro-batch, F frequencies, half of a head's features; D = 2 F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

__all__ = ["InterleavedRotaryEmbedding", "interleaved_axes"]


def interleaved_axes(section: Sequence[int], frequencies: int) -> list[int]:
    """The axis of each frequency: 0 (time), 1 (height) or 2 (width).

    Args:
        section: how many frequencies turn with time, height and width.
        frequencies: F.
    """
    axes = [0] * frequencies
    for axis in (1, 2):
        for number in range(axis, min(3 * section[axis], frequencies), 3):
            axes[number] = axis
    return axes


class InterleavedRotaryEmbedding(MultimodalRotaryEmbedding):
    """In the place of megatron-core's; the positions that it is given are this rank's.

    Args:
        section: see :func:`interleaved_axes`.
        given: megatron-core's arguments.
    """

    def __init__(self, *, section: Sequence[int], **given: Any) -> None:
        super().__init__(**given)
        axes = interleaved_axes(section, self.inv_freq.numel())
        self.axes_F = torch.tensor(axes, device=self.inv_freq.device)

    def forward(
        self,
        position_ids: Tensor,
        mrope_section: list[int],  # noqa: ARG002 (the axes are known)
        cp_group: Any = None,  # noqa: ARG002 (positions are cut by the model)
    ) -> Tensor:
        """Angles [S, B, 1, D] of positions [3, B, S]."""
        positions_3BS = position_ids.to(device=self.inv_freq.device)
        positions_SBF = positions_3BS.index_select(0, self.axes_F).permute(2, 1, 0)
        angles_SBF = positions_SBF.float() * self.inv_freq
        return torch.cat([angles_SBF, angles_SBF], dim=-1).unsqueeze(2)
