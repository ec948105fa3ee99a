"""The loss of positions that have a label: no logits of media, padding and what is not trained.

Which positions these are is known on the host where labels are made, so that nothing waits for the
device; their number is a shape. Hidden states are gathered before the output layer.

Legend: S sequence (this context-parallel rank's), B micro-batch, H hidden, K label positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.labels import NO_LABEL
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRows:
    """The positions at which the loss is computed.

    Attributes:
        rows_K: long [K], rows ``s * B + b`` of the hidden states [S, B, H], each once.
    """

    rows_K: torch.Tensor

    def labels(self, labels_BS: torch.Tensor) -> torch.Tensor:
        """The labels [K] of these positions."""
        return labels_BS.t().flatten().index_select(0, self.rows_K)

    def hidden(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Their hidden states [K, H]; the gradient of all others is zero."""
        hidden_KH: torch.Tensor = _TakeRows.apply(hidden_SBH.flatten(0, 1), self.rows_K)
        return hidden_KH

    def losses(self, losses_K: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """The losses [B, S] of all positions: zeros where none was computed."""
        batch, sequence = labels_BS.shape
        losses_L = losses_K.new_zeros(batch * sequence).index_copy_(0, self.rows_K, losses_K)
        return losses_L.view(sequence, batch).t().contiguous()


class _TakeRows(torch.autograd.Function):
    """``index_select`` of rows none of which is taken twice: their gradients are no sums."""

    @staticmethod
    def forward(ctx: Any, hidden_LH: torch.Tensor, rows_K: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_K)
        ctx.shape = hidden_LH.shape
        return hidden_LH.index_select(0, rows_K)

    @staticmethod
    def backward(ctx: Any, grad_KH: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows_K,) = ctx.saved_tensors
        return grad_KH.new_zeros(ctx.shape).index_copy_(0, rows_K, grad_KH), None


def find_label_rows(labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor | None) -> torch.Tensor:
    """Rows ``s * B + b`` that have a label and count: long [K], at least one; on the host.

    Args:
        labels_BS: of a context-parallel rank, [B, S].
        loss_mask_BS: [B, S].

    Raises:
        InputError: labels on a device.
    """
    if labels_BS.device.type != "cpu":
        raise InputError(
            f"labels lie on {labels_BS.device}; find their rows on the host, before they are moved"
        )
    has_label_BS = labels_BS != NO_LABEL
    if loss_mask_BS is not None:
        has_label_BS &= loss_mask_BS != 0
    rows_K = has_label_BS.t().flatten().nonzero()[:, 0]
    # Without any, one is computed for nothing: operations on empty tensors are a kind of their own.
    return rows_K if len(rows_K) else rows_K.new_zeros(1)


def loss_of_label_rows(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    runtime_gather_output: bool | None,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    context: LabelRows,
    **_: Any,
) -> torch.Tensor:
    """Losses [B, S]; an ``output_processor`` of megatron-core's GPTModel, which says the arguments.

    Where the output layer gathers a sequence that is cut over tensor-parallel ranks, they take part
    in the same gather here.
    """
    with _gathered(hidden_states, output_layer) as hidden_SBH:
        logits_K1V, _bias = output_layer(
            context.hidden(hidden_SBH)[:, None],
            weight=output_weight,
            runtime_gather_output=runtime_gather_output,
        )
    labels_1K = context.labels(labels)[None]
    losses_1K = compute_language_model_loss(labels_1K, scale_logits(logits_K1V))
    return context.losses(losses_1K[0], labels)


@contextmanager
def _gathered(hidden_SBH: torch.Tensor, output_layer: Any) -> Iterator[torch.Tensor]:
    """The whole sequence, while the output layer leaves gathering it to others."""
    if not output_layer.sequence_parallel:
        yield hidden_SBH
        return
    # The layer then adds up the gradient itself, so that of the gather is a slice of it.
    whole_SBH = gather_from_sequence_parallel_region(
        hidden_SBH, tensor_parallel_output_grad=False, group=output_layer.tp_group
    )
    output_layer.sequence_parallel = False
    try:
        yield whole_SBH
    finally:
        output_layer.sequence_parallel = True
