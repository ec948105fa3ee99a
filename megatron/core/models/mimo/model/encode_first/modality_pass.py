"""One modality in a step that encodes first: its rows to the first stage, their gradients back.

On ranks that both encode and run the language model. Legend: N rows, W the width of a row with its
levels beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import Encoded
from megatron.core.models.mimo.comm.exchange import exchange_rows
from megatron.core.models.mimo.comm.messages import Messages
from megatron.core.models.mimo.comm.row_routes import RowRoutes
from megatron.core.models.mimo.model.encode_first.encoder_calls import (
    Called,
    EncoderCalls,
    Modality,
)
from megatron.core.models.mimo.model.encode_first.encoder_work import (
    InputsOfOthers,
    Job,
    deal,
    encodings_of,
)
from megatron.core.models.mimo.model.encode_first.media_units import Call
from megatron.core.models.mimo.model.grids.wide_rows import join_levels, split_levels


class ModalityPass:
    """The work of one modality in one step, on this rank.

    All ranks of the pool make one, with jobs of as many micro-batches.

    Args:
        modality: the modality whose rows they are.
        jobs: jobs of this rank's replica of the language model, one for each micro-batch.
        replica: number of this replica.
        group: group of the pool's ranks; None where it is this rank alone.

    Attributes:
        cost: cost of what this rank encodes, and of what the pool does.
    """

    def __init__(
        self,
        modality: Modality,
        jobs: Sequence[Job],
        replica: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._modality, self._group = modality, group
        self._jobs, self._replica = jobs, replica
        pool, rank = modality.pool, dist.get_rank()
        messages = Messages(group)
        inputs = InputsOfOthers(modality, messages, replica, len(jobs))
        every = inputs.jobs(jobs)
        dealt = deal(modality, every)
        with messages.together():
            for number, job in enumerate(jobs):
                inputs.send(number, job.inputs, dealt)
                inputs.expect(number, every, dealt)
        self._calls = inputs.calls(range(len(every)), every, dealt)
        messages.settle()
        own = pool.owner_of(rank)
        encodings, sizes = encodings_of(every, dealt, len(pool.owners))
        self._routes = RowRoutes(pool, rank, encodings, sizes[own])
        self._run = EncoderCalls(modality)
        self._hidden: list[Encoded] = []
        self._called: list[Called] = []
        self._sizes: list[int] = []
        self._leaves: list[torch.Tensor] = []
        pairs = [*zip(dealt.units, dealt.owners, strict=True)]
        self.cost = (
            sum(unit.cost for unit, owner in pairs if owner == own),
            sum(unit.cost for unit, _ in pairs),
        )

    def encode_ahead(self) -> None:
        """Run the encoders, which are frozen, before the step; their projection runs in it."""
        self._hidden = [self._run.encode(call) for call in self._calls]

    def place(self, seed: int | None) -> list[Encoded]:
        """Encode, and bring the rows to the ranks that place them.

        All ranks of the pool take part in one exchange.

        Args:
            seed: for the random numbers of the encoders; None where they draw none.

        Returns:
            For each micro-batch, the rows that this rank places, with gradient; [] off the first
            stage.
        """
        self._run.seed = seed
        idle: list[Call | None] = [None]
        hidden: Sequence[Encoded | None] = self._hidden or [None] * max(len(self._calls), 1)
        ran = [
            self._run.forward(call, before)
            for call, before in zip(self._calls or idle, hidden, strict=True)
        ]
        self._hidden, self._calls = [], []
        self._called = [called for _, called in ran]
        self._sizes = [wide_NW.size(0) for wide_NW, _ in ran]
        given_NW = torch.cat([wide_NW for wide_NW, _ in ran]).contiguous()
        wide_NW = exchange_rows(given_NW, self._routes.forward(), self._group)
        self._leaves = self._cut(wide_NW)
        return [split_levels(leaf, self._modality.levels) for leaf in self._leaves]

    def backward(self) -> None:
        """Bring the rows' gradients back to the ranks that encoded them, and run backward there.

        All ranks of the pool take part in one exchange; nothing where the modality is frozen.
        """
        if not self._modality.trains:
            return
        grads = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves
        ]
        nothing_NW = join_levels(None, self._modality.levels, self._modality.like_H)
        given_NW = torch.cat([nothing_NW, *grads])
        self._leaves = []
        grad_NW = exchange_rows(given_NW, self._routes.backward(), self._group)
        parts = grad_NW.split_with_sizes(self._sizes)
        for number, (called, part_NW) in enumerate(zip(self._called, parts, strict=True)):
            self._run.backward(called, part_NW, last=number == len(parts) - 1)

    def _cut(self, wide_NW: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each micro-batch, as leaves."""
        places = self._modality.pool.readers[self._replica]
        here = next((at for at, rank in places.items() if rank == dist.get_rank()), None)
        if here is None:
            return []
        sizes = [job.placement.rows_at(here) for job in self._jobs]
        leaves = [part.detach() for part in wide_NW.split_with_sizes(sizes)]
        return [leaf.requires_grad_(self._modality.trains) for leaf in leaves]
