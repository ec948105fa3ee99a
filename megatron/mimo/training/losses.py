"""Several losses in one step: counts the positions of each in the global batch beforehand.

Megatron divides summed gradients once, by the number of text labels of the global batch. A further
loss is divided by the number of its own positions, so that it has to be scaled by the ratio of the
two when the first micro-batch goes back. A step's micro-batches are therefore read ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mimo.data.micro_batches.batch import HEAD_TARGETS, Batch

if TYPE_CHECKING:
    from megatron.core.models.mimo.config import HeadSpec

__all__ = ["CountedBatches"]


class CountedBatches:
    """Micro-batches of the last pipeline stage, each with the numbers of its step.

    Args:
        heads: of the model.
        balanced: its experts are balanced by a loss.
    """

    def __init__(self, heads: Mapping[str, HeadSpec], *, balanced: bool = False) -> None:
        self._heads, self._balanced = heads, balanced
        self._ahead: deque[Batch] = deque()
        self._counts: dict[str, Tensor] = {}

    def next(self, batches: Iterator[Batch]) -> tuple[Batch, dict[str, Tensor]]:
        """The next micro-batch, and each loss's number of positions in its global batch.

        The first call of a step reads all of this rank's micro-batches, and the data-parallel ranks
        add their numbers up: one all-reduce of one number for each loss.
        """
        if not self._ahead:
            from megatron.core.num_microbatches_calculator import get_num_microbatches

            self._ahead.extend(next(batches) for _ in range(get_num_microbatches()))
            self._counts = self._count()
        return self._ahead.popleft(), self._counts

    def _count(self) -> dict[str, Tensor]:
        from megatron.core import mpu
        from megatron.core.models.mimo.model.language.expert_balance import (
            EXPERT_BALANCE,
            count_tokens,
        )
        from megatron.core.models.mimo.model.language.heads import count_positions

        counts: dict[str, Any] = {}
        for batch in self._ahead:
            found = count_positions(
                batch["labels"], batch.get("loss_mask"), batch.get(HEAD_TARGETS), self._heads
            )
            if self._balanced:
                found[EXPERT_BALANCE] = count_tokens(batch.get("padding_mask"), batch["labels"])
            counts = {name: count + counts.get(name, 0) for name, count in found.items()}
        numbers_K = torch.stack(list(counts.values()))
        dist.all_reduce(numbers_K, group=mpu.get_data_parallel_group())
        return dict(zip(counts, numbers_K.unbind(), strict=True))
