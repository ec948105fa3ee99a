"""The forward step and the loss: one gradient contract for every layout.

The loss of a micro-batch is the plain sum of its per-token losses; of a model with further heads,
the weighted sum of several (``losses``). Megatron divides the summed gradients once, by the number
of label positions of the whole global batch, so that neither micro-batching nor the parallel layout
changes the result.

Shape legend: B micro-batch, S sequence (S_local after context parallelism), V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.model.language.heads import Losses
from megatron.core.models.mimo.ranges import named_range
from megatron.core.utils import unwrap_model
from megatron.mimo.data.micro_batches.batch import (
    HEAD_TARGETS,
    LABEL_ROWS,
    SOURCE_IDS,
    SOURCE_NAMES,
    Batch,
)
from megatron.mimo.process import presence
from megatron.mimo.recipes.recipe import Recipe
from megatron.mimo.training.losses import CountedBatches

__all__ = [
    "LOSS",
    "OF_SOURCE",
    "build_forward_step",
    "losses_by_source",
    "model_inputs",
    "sum_loss",
    "sum_losses",
    "token_losses",
    "whole_vocabulary",
]

LOSS = "lm loss"
OF_SOURCE = "loss of source "  # and its name

LossReport = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, LossReport]]


def sum_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, LossReport]:
    """Sum the losses of the label positions.

    Args:
        loss_mask_BS: float [B, S_local], 1 at label positions.
        losses_BS: per-token losses, [B, S_local].

    Returns:
        The sum (0-d, with gradient), the number of label positions (0-d int32), and
        ``{"lm loss": float32 [sum, number]}`` for the log; no value is read on the host.
    """
    mask_N = loss_mask_BS.reshape(-1).float()
    total = torch.sum(losses_BS.reshape(-1).float() * mask_N)
    count = mask_N.sum().detach().to(torch.int32)
    return total, count, {LOSS: torch.stack([total.detach(), count.float()])}


def losses_by_source(
    names: Sequence[str], ids_BS: Tensor, loss_mask_BS: Tensor, losses_BS: Tensor
) -> LossReport:
    """Sums and numbers of the label positions of each source; no value is read on the host.

    Args:
        names: of the sources.
        ids_BS: source of each position, int64 [B, S_local]; the number of sources for none.
        loss_mask_BS: float [B, S_local], 1 at label positions.
        losses_BS: per-token losses, [B, S_local].
    """
    mask_N = loss_mask_BS.reshape(-1).float()
    both_2N = torch.stack([losses_BS.reshape(-1).float() * mask_N, mask_N])
    sums = both_2N.new_zeros(2, len(names) + 1).index_add_(1, ids_BS.reshape(-1), both_2N)
    return {f"{OF_SOURCE}{name}": sums[:, number] for number, name in enumerate(names)}


def token_losses(logits_BSV: Tensor, labels_BS: Tensor, tp_group: Any) -> Tensor:
    """Cross-entropy of each token, [B, S], from this rank's shard of the vocabulary.

    Collective over ``tp_group``.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_SBV = logits_BSV.transpose(0, 1).float().contiguous()
    labels_SB = labels_BS.transpose(0, 1).contiguous()
    losses_SB = vocab_parallel_cross_entropy(logits_SBV, labels_SB, tp_group=tp_group)
    return losses_SB.transpose(0, 1).contiguous()


def whole_vocabulary(logits_BSV: Tensor, vocab_size: int, tp_group: Any) -> Tensor:
    """Gather the shards of the vocabulary, if it is sharded; then collective over ``tp_group``.

    Args:
        logits_BSV: this rank's shard, or already [B, S, vocab_size].
        vocab_size: padded size of the whole vocabulary.
        tp_group: the tensor-parallel group.
    """
    if logits_BSV.size(-1) == vocab_size:
        return logits_BSV
    shards = [torch.empty_like(logits_BSV) for _ in range(tp_group.size())]
    torch.distributed.all_gather(shards, logits_BSV.contiguous(), group=tp_group)
    return torch.cat(shards, dim=-1)


def build_forward_step(recipe: Recipe, args: Namespace) -> Callable[..., tuple[Tensor, Any]]:
    """The function that Megatron's schedules call for each micro-batch.

    It returns the model's output and the function that turns this output, on the last pipeline
    stage, into the loss. In evaluation the recipe's task metric is reported beside the loss.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    read = _reader()
    slot = presence.here().slot

    def forward_step(
        data_iterator: Iterator[Batch] | None, model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        timers = get_timers()
        slot.enter("reading data")
        timers("batch-generator", log_level=2).start()
        with named_range("data"):
            batch, counts = read(data_iterator, model)
        timers("batch-generator").stop()
        slot.enter("forward")
        labels_BS = batch.get("labels")
        # under context parallelism a rank has a part of each sequence only: no metric there
        whole = recipe.task_metric is not None and args.context_parallel_size == 1
        evaluate = whole and not torch.is_grad_enabled()
        if evaluate and labels_BS is not None:
            logits_BSV, loss_mask_BS = model(**model_inputs(batch, labels=None))
            tp_group = get_attr_wrapped_model(model, "pg_collection").tp
            return logits_BSV, partial(
                _evaluation_report, recipe, args, batch, labels_BS, loss_mask_BS, tp_group
            )
        inputs = model_inputs(batch, labels=labels_BS)
        if unwrap_model(model).takes_label_rows:
            inputs[LABEL_ROWS] = batch.get(LABEL_ROWS)
        output, loss_mask_BS = model(**inputs)
        if torch.is_grad_enabled():
            slot.enter("backward")
        sources = batch.get(SOURCE_NAMES, ()), batch.get(SOURCE_IDS)
        return output, partial(_checked_loss, args, loss_mask_BS, counts, sources)

    return forward_step


def _reader() -> Callable[..., tuple[Batch, Mapping[str, Tensor]]]:
    """Reads micro-batches of any chunk of the model, with numbers where it has several losses."""
    counted: dict[int, CountedBatches] = {}

    def read(
        data_iterator: Iterator[Batch] | None, model: torch.nn.Module
    ) -> tuple[Batch, Mapping[str, Tensor]]:
        if data_iterator is None:
            return {}, {}
        bare = unwrap_model(model)
        if not bare.has_further_losses or not torch.is_grad_enabled():
            return dict(next(data_iterator)), {}
        if id(model) not in counted:
            counted[id(model)] = CountedBatches(bare.heads, balanced=bare.balances_experts)
        batch, counts = counted[id(model)].next(data_iterator)
        return dict(batch), counts

    return read


def model_inputs(batch: Batch, labels: Tensor | None) -> dict[str, Any]:
    """``MimoModel.forward``'s arguments; what this stage has not received is None."""
    return {
        "input_ids": batch.get("input_ids"),
        "position_ids": batch.get("position_ids"),
        "attention_mask": None,
        "labels": labels,
        "loss_mask": batch.get("loss_mask"),
        "modality_inputs": batch.get("modality_inputs"),
        "alignment_plan": batch.get("alignment_plan"),
        "packing_kwargs": batch.get("packing_kwargs"),
        "span_ids": batch.get("span_ids"),
        "padding_mask": batch.get("padding_mask"),
        HEAD_TARGETS: batch.get(HEAD_TARGETS),
        "encoded_rows": batch.get("encoded_rows"),
    }


def sum_losses(losses: Losses, counts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, LossReport]:
    """As ``sum_loss``, for a model with further losses: the weighted sum of all.

    Args:
        losses: of a micro-batch.
        counts: positions of each in the global batch; {} in evaluation, which only reports.
    """
    text = losses[TEXT]
    total = losses.total(counts) if counts else text.sum
    report = {
        LOSS if name == TEXT else f"{name} loss": torch.stack([loss.sum.detach(), loss.count])
        for name, loss in losses.items()
    }
    return total, text.count.to(torch.int32), report


def _checked_loss(
    args: Namespace,
    loss_mask_BS: Tensor,
    counts: Mapping[str, Tensor],
    sources: tuple[Sequence[str], Tensor | None],
    output: Tensor | Losses,
) -> tuple[Tensor, Tensor, LossReport]:
    """Apply Megatron's checks of results to the loss; where they are on, they read its value."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    if isinstance(output, Losses):
        total, count, report = sum_losses(output, counts)
        losses_BS = output.text_BS
    else:
        total, count, report = sum_loss(loss_mask_BS, output)
        losses_BS = output
    names, ids_BS = sources
    if ids_BS is not None:
        report |= losses_by_source(names, ids_BS, loss_mask_BS, losses_BS.detach())
    if torch.is_grad_enabled():
        machine = get_rerun_state_machine()
        if args.check_for_nan_in_loss_and_grad:
            machine.validate_result(
                result=total.detach(),
                rejection_func=lambda value: not torch.isfinite(value),
                message="the loss of a micro-batch is NaN or infinite",
                tolerance=0.0,
                fatal=True,
            )
        if args.check_for_spiky_loss:
            machine.validate_result(
                result=total.detach(),
                rejection_func=partial(machine.is_unexpectedly_large, threshold=10, context="loss"),
                message="the loss of a micro-batch jumped",
                tolerance=0.0,
                fatal=False,
            )
    return total, count, report


def _evaluation_report(
    recipe: Recipe,
    args: Namespace,
    batch: Batch,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    tp_group: Any,
    logits_BSV: Tensor,
) -> tuple[Tensor, Tensor, LossReport]:
    assert recipe.task_metric is not None
    whole_BSV = whole_vocabulary(logits_BSV, args.padded_vocab_size, tp_group)
    if whole_BSV is logits_BSV:
        losses_BS = F.cross_entropy(
            logits_BSV.float().flatten(0, 1), labels_BS.flatten(), reduction="none"
        ).view_as(labels_BS)
    else:
        losses_BS = token_losses(logits_BSV, labels_BS, tp_group)
    total, count, report = sum_loss(loss_mask_BS, losses_BS)
    for name, (value, number) in recipe.task_metric(whole_BSV, batch).items():
        report[name] = torch.stack(
            [torch.as_tensor(part, device=total.device).float() for part in (value, number)]
        )
    return total, count, report
