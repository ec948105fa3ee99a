"""Keeps the padding of a vocabulary out of the loss, the gradients and what is generated.

Megatron rounds a vocabulary up, to a multiple that grows with tensor parallelism, and its
cross-entropy counts the padding among the possible tokens. With the same weights the loss would
differ by the padding's share: from a model of Hugging Face, which has none, and from layout to
layout. Padding would be trained, and could be generated.

Legend: S sequence, B micro-batch, V vocabulary, padded and divided over tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, finfo, nn
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.errors import ConfigError
from megatron.core.models.mimo.model.language.label_rows import LabelRows
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_pg_size
from megatron.mimo.layers.turns import TurningGPT
from megatron.mimo.layers.vocabulary_loss import chunked_cross_entropy
from megatron.mimo.models.common.settings import WHOLE_LOGITS

__all__ = ["UnpaddedGPT", "leave_out_padding", "real_tokens"]


class UnpaddedGPT(TurningGPT):
    """A GPTModel that gives padding of its vocabulary no probability.

    Where a ``LabelRows`` comes as ``output_processor_context`` the loss is of these rows. Where the
    logits of a micro-batch would be large, its loss is computed piece by piece
    (:mod:`megatron.mimo.layers.vocabulary_loss`).

    Args:
        tokens: size of the vocabulary without padding.
        whole_logits: bytes of fp32 logits on this rank from which on they count as large.
        arguments: GPTModel's.

    Raises:
        ConfigError: padding with a loss that is computed without logits.
    """

    def __init__(self, *, tokens: int, whole_logits: int = WHOLE_LOGITS, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokens, self._whole_logits = tokens, whole_logits
        leave_out_padding(self, tokens=tokens, rows=self.vocab_size, tp_group=self.pg_collection.tp)

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        *given: Any,
        **named: Any,
    ) -> Tensor:
        """As GPTModel's: logits, or with labels the losses [B, S]."""
        if labels is not None and self.post_process:
            rows: LabelRows | None = named.get("output_processor_context")
            if self._cuts_loss(labels.numel() if rows is None else len(rows.rows_K)):
                return self._losses_in_pieces(hidden_states, labels, rows)
        output: Tensor = super()._postprocess(
            hidden_states, input_ids, position_ids, labels, *given, **named
        )
        return output

    def _cuts_loss(self, tokens: int) -> bool:
        """Whether the loss of so many tokens is computed piece by piece."""
        config, layer = self.config, self.output_layer
        large = 4 * tokens * self.vocab_size // get_pg_size(self.pg_collection.tp)
        if large <= self._whole_logits or config.cross_entropy_loss_fusion:
            return False
        # What changes logits, or looks at them, needs all of them.
        hooks = layer._forward_hooks.values()
        plain = all(isinstance(hook, _HidePadding) for hook in hooks)
        plain &= not hasattr(layer, "adapter") and layer.bias is None
        special = config.mtp_num_layers or config.use_mup or config.defer_embedding_wgrad_compute
        return plain and not special

    def _losses_in_pieces(
        self, hidden_SBH: Tensor, labels_BS: Tensor, rows: LabelRows | None
    ) -> Tensor:
        group = self.pg_collection.tp
        weight_VH = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight_VH = self.shared_embedding_or_output_weight()
        if self.output_layer.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=group)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
        first = get_pg_rank(group) * len(weight_VH)
        losses_T = chunked_cross_entropy(
            hidden_SBH.flatten(0, 1) if rows is None else rows.hidden(hidden_SBH),
            weight_VH,
            labels_BS.t().flatten() if rows is None else rows.labels(labels_BS),
            first=first,
            group=group,
            words=min(max(self._tokens - first, 0), len(weight_VH)),
        )
        if rows is not None:
            return rows.losses(losses_T, labels_BS)
        return losses_T.view(hidden_SBH.shape[:2]).t().contiguous()


def real_tokens(output_layer: nn.Module, rows: int) -> int:
    """Tokens without padding of an output layer of so many rows."""
    hooks = output_layer._forward_hooks.values()
    return next((hook.tokens for hook in hooks if isinstance(hook, _HidePadding)), rows)


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
