"""A GPTModel whose padded vocabulary computes what the vocabulary alone would.

Megatron rounds a vocabulary up, and its cross-entropy counts the rows of padding among the tokens
that might have come. A model of Hugging Face has no such rows: with the same weights the loss would
differ by their share, and they would be trained.

Legend: S sequence, B micro-batch, V vocabulary, padded and divided over tensor-parallel ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.utils import get_pg_rank, get_pg_size

__all__ = ["UnpaddedGPT"]


class UnpaddedGPT(GPTModel):
    """A GPTModel that gives padding of its vocabulary no probability.

    Args:
        tokens: size of the vocabulary without padding.
        arguments: GPTModel's.

    Raises:
        ConfigError: padding with a loss that is computed without logits.
    """

    def __init__(self, *, tokens: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        config = self.config
        if not self.post_process or tokens == self.vocab_size:
            return
        if config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "linear":
            raise ConfigError(
                f"--cross-entropy-fusion-impl linear with a vocabulary of {tokens} tokens padded "
                f"to {self.vocab_size}: this loss has no logits, from which padding could be left "
                "out; use 'native' or 'te', or a --make-vocab-size-divisible-by without padding"
            )
        rank, ranks = get_pg_rank(self.pg_collection.tp), get_pg_size(self.pg_collection.tp)
        width = self.vocab_size // ranks
        self.output_layer.register_forward_hook(
            partial(_hide_padding, tokens=tokens, width=width, first=rank * width)
        )


def _hide_padding(
    _: nn.Module,
    __: Any,
    output: tuple[Tensor, Tensor | None],
    *,
    tokens: int,
    width: int,
    first: int,
) -> None:
    """Set the logits of padding to the least number there is.

    In place: the logits are the largest tensor of a step.

    Args:
        output: logits [S, B, V], and a bias.
        tokens: size of the vocabulary without padding.
        width: logits that a rank has, unless they have been gathered.
        first: token of this rank's first.
    """
    logits_SBV = output[0]
    start = tokens - first if logits_SBV.size(-1) == width else tokens
    padding = logits_SBV[..., max(start, 0) :]
    if padding.numel():
        padding.fill_(torch.finfo(padding.dtype).min)
