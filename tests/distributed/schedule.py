"""A step on ranks: forward and backward of a global batch by Megatron's schedule, and its loss.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SUM_AND_COUNT", "Sizes", "loss_of_labels", "run_schedule", "wrap_plainly"]

SUM_AND_COUNT = "sum and count"  # what a forward step reports of a micro-batch

ForwardStep = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the parallelism."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


def run_schedule(
    wrapped: Sequence[Any],
    micro_batches: Sequence[Any],
    forward_step: ForwardStep,
    *,
    seq_length: int,
    micro_batch_size: int,
    schedule: Callable[..., Any] | None = None,
) -> float:
    """Forward and backward of a global batch; its loss, on every rank.

    Args:
        wrapped: this rank's chunks of the model; several run interleaved.
        micro_batches: this rank's.
        forward_step: Megatron's, which reports ``SUM_AND_COUNT`` of each.
        seq_length: S, uncut.
        micro_batch_size: B.
        schedule: in place of the one that Megatron takes for its sizes.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(micro_batches) for _ in wrapped]
    reports = (schedule or get_forward_backward_func())(
        forward_step_func=forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=list(wrapped),
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    total = torch.zeros(2, dtype=torch.float64)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += torch.stack([report[SUM_AND_COUNT] for report in reports]).double().sum(dim=0)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def loss_of_labels(micro_batches: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
    """A forward step whose micro-batches are the arguments of ``MimoModel.forward``."""
    losses_BS, mask_BS = model(**next(micro_batches))
    return losses_BS, partial(_sum, mask_BS)


def _sum(mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = (losses_BS * mask_BS).sum(), mask_BS.sum()
    report = {SUM_AND_COUNT: torch.stack([total.detach(), count])}
    return total, count.to(torch.int32), report


def wrap_plainly(model: Any) -> Any:
    """A model in Megatron's data-parallel wrapper with its defaults, gradients at zero."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType

    model.model_type = ModelType.encoder_or_decoder  # as pretrain does
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.train()
    wrapped.zero_grad_buffer()
    return wrapped
