"""A padded vocabulary that computes what the vocabulary alone would.

Megatron rounds a vocabulary up, to a multiple that grows with tensor parallelism, and its
cross-entropy counts the rows of padding among the tokens that might have come. With the same
weights the loss would differ by their share: from a model of Hugging Face, which has no such rows,
and from layout to layout. They would be trained, and could be generated.

Legend: S sequence, B micro-batch, V vocabulary, padded and divided over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, finfo, nn
from torch.distributed import ProcessGroup

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.errors import ConfigError
from megatron.core.utils import get_pg_rank, get_pg_size

__all__ = ["UnpaddedGPT", "leave_out_padding"]


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
        leave_out_padding(self, tokens=tokens, rows=self.vocab_size, tp_group=self.pg_collection.tp)


def leave_out_padding(
    language_model: nn.Module, *, tokens: int, rows: int, tp_group: ProcessGroup
) -> None:
    """Give the rows of padding no probability and no gradient; a second call does nothing.

    Args:
        language_model: GPTModel or another with an ``output_layer`` that returns logits and a bias;
            pipeline stages without one are left as they are.
        tokens: size of the vocabulary.
        rows: size with padding.
        tp_group: the ranks that the vocabulary is divided over.

    Raises:
        ConfigError: padding with a loss that is computed without logits.
    """
    output_layer = getattr(language_model, "output_layer", None)
    if output_layer is None or tokens >= rows:
        return
    if any(isinstance(hook, _HidePadding) for hook in output_layer._forward_hooks.values()):
        return
    config: Any = language_model.config
    if config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "linear":
        raise ConfigError(
            f"--cross-entropy-fusion-impl linear with a vocabulary of {tokens} tokens padded "
            f"to {rows}: this loss has no logits, from which padding could be left "
            "out; use 'native' or 'te', or a --make-vocab-size-divisible-by without padding"
        )
    width = rows // get_pg_size(tp_group)
    first = get_pg_rank(tp_group) * width
    output_layer.register_forward_hook(_HidePadding(tokens=tokens, width=width, first=first))


@dataclass(frozen=True, kw_only=True)
class _HidePadding:
    """A hook that sets the logits of padding to the least number there is.

    In place: the logits are the largest tensor of a step.

    Attributes:
        tokens: size of the vocabulary without padding.
        width: logits that a rank has, unless they have been gathered.
        first: token of this rank's first.
    """

    tokens: int
    width: int
    first: int

    def __call__(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
        logits_SBV = output[0]
        start = self.tokens - (self.first if logits_SBV.size(-1) == self.width else 0)
        padding = logits_SBV[..., max(start, 0) :]
        if padding.numel():
            padding.fill_(finfo(padding.dtype).min)
