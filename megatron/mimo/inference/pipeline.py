"""One micro-batch through all pipeline stages, forward only.

Megatron's schedules run micro-batches of one shape through stages that keep activations for
backward. Here shapes change from step to step and nothing is kept: a stage receives, computes and
sends on without waiting for the receiver, so that several micro-batches are under way at once.

Legend: S sequence, B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.models.mimo import MimoModel

__all__ = ["Pipeline"]


class Pipeline:
    """This rank's chunks of the model, between those of its neighbours.

    Args:
        chunks: of this rank, in the order of the model's layers; with ``pg_collection``.

    Attributes:
        is_first: the embedding is on this rank.
        is_last: the output layer is on this rank.
        group: the pipeline-parallel group.
        device: of the parameters.
    """

    def __init__(self, chunks: Sequence[MimoModel]) -> None:
        self._chunks = list(chunks)
        self.group: dist.ProcessGroup = chunks[0].pg_collection.pp
        self.device = next(chunks[0].parameters()).device
        rank, size = self.group.rank(), self.group.size()
        self.is_first, self.is_last = rank == 0, rank == size - 1
        self._before, self._behind = (rank - 1) % size, (rank + 1) % size
        self._sent: list[tuple[Any, Tensor]] = []

    def run(
        self, first_inputs: Mapping[str, Any], every_input: Mapping[str, Any], shape_SB: list[int]
    ) -> Tensor | None:
        """Run all of this rank's chunks; collective over the pipeline.

        Args:
            first_inputs: arguments of the chunk that embeds. Where :attr:`needs_plan`, others read
                the plan among them.
            every_input: arguments of every chunk.
            shape_SB: tokens of each sequence, and sequences.

        Returns:
            What the last stage's ``forward`` gives, logits [B, S or 1, V]; None on other ranks.
        """
        output = None
        for chunk in self._chunks:
            inputs: dict[str, Any] = {"input_ids": None, **every_input}
            if chunk.pre_process:
                inputs |= first_inputs
            else:
                shape = [*shape_SB, chunk.config.hidden_size]
                if chunk.level_route.arrives:  # levels of rows, with the hidden states
                    plan = inputs["alignment_plan"] = first_inputs["alignment_plan"]
                    shape = chunk.level_route.message_shape(plan, hidden_size=shape[-1])
                chunk.set_input_tensor(self._receive(chunk, shape))
            output, _ = chunk(**inputs)
            if not chunk.post_process:
                self._send(output)
        return output if self._chunks[-1].post_process else None

    def finish_sending(self) -> None:
        """Wait until the neighbours have what was sent to them."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def share_tokens(self, tokens_N: Tensor | None, count: int) -> Tensor:
        """Tokens [N] of the last stage, on all stages and on the device; collective."""
        if self.group.size() == 1:
            assert tokens_N is not None, "the only stage has chosen tokens"
            return tokens_N
        if tokens_N is None:
            tokens_N = torch.empty(count, dtype=torch.int64, device=self.device)
        dist.broadcast(tokens_N, group_src=self.group.size() - 1, group=self.group)
        return tokens_N

    @property
    def needs_plan(self) -> bool:
        """Whether this stage reads the plan: it embeds, or levels of rows arrive."""
        return self.is_first or any(chunk.level_route.arrives for chunk in self._chunks)

    def _receive(self, chunk: MimoModel, shape: list[int]) -> Tensor:
        config = chunk.config
        wide = config.fp32_residual_connection
        dtype = torch.float32 if wide else config.pipeline_dtype or config.params_dtype
        message = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(message, group_src=self._before, group=self.group)
        return message

    def _send(self, hidden_SBH: Tensor) -> None:
        hidden_SBH = hidden_SBH.contiguous()
        work = dist.isend(hidden_SBH, group_dst=self._behind, group=self.group)
        self._sent.append((work, hidden_SBH))
