"""Rotary embeddings with any frequencies, and of several kinds for several layers.

Legend: S positions, D channels of a head that turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.mimo.errors import UnsupportedError

__all__ = ["Frequencies", "RotaryAngles"]


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """How fast the channels of a head turn.

    Attributes:
        inverse: radians for each position, D / 2 of them: fp32 numbers.
        factor: of sines and cosines.
        longest: the longest text that they are right for, in positions; None for any.
    """

    inverse: tuple[float, ...]
    factor: float = 1.0
    longest: int | None = None


class RotaryAngles(RotaryEmbedding):
    """The angles [S, 1, 1, kinds * D] of several kinds of frequencies, one behind the other.

    A layer takes those of its kind (``LayerTraits``).

    Args:
        kinds: at least one; all of one length.
        arguments: of megatron-core's ``RotaryEmbedding``.
    """

    inv_freq: Tensor

    def __init__(self, kinds: Sequence[Frequencies], **arguments: Any) -> None:
        super().__init__(**arguments)
        inverse = [kind.inverse for kind in kinds]
        self.kinds = len(inverse)
        self.longest = min((kind.longest for kind in kinds if kind.longest), default=None)
        device = self.inv_freq.device
        self.inv_freq = torch.tensor(inverse, dtype=torch.float32, device=device).flatten()

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """The angles of positions ``offset`` to ``offset + max_seq_len - 1``, uncut.

        Raises:
            UnsupportedError: a longer text than the frequencies are right for.
        """
        if self.longest is not None and max_seq_len + offset > self.longest:
            raise UnsupportedError(
                f"rotary embeddings of the kind 'dynamic' for {max_seq_len + offset} positions; "
                f"expected at most {self.longest} (max_position_embeddings): beyond, transformers "
                "turns the tokens of one text at different rates; take the kind 'yarn' or 'linear'"
            )
        angles = super().get_emb(max_seq_len, offset)
        halves = angles.view(len(angles), 2, self.kinds, -1)  # each kind twice, as halves of a head
        return halves.transpose(1, 2).reshape(len(angles), 1, 1, -1)
