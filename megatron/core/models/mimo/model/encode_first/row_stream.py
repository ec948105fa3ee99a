"""Rows that travel micro-batch by micro-batch from ranks of encoders to the language model's.

The encoders' ranks run a 1F1B of their own beside the language model's schedule: they encode ahead
of it, and run backward of a micro-batch as soon as the gradients of its rows are there. How far
ahead is bounded, so that activations, rows and inputs of a few micro-batches are held at a time.

Legend: N rows, W the width of a row with its levels beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron.core.models.mimo.alignment import Encoded
from megatron.core.models.mimo.comm.exchange import Routes
from megatron.core.models.mimo.comm.messages import Message, Messages
from megatron.core.models.mimo.comm.pools import Pool
from megatron.core.models.mimo.comm.row_routes import RowRoutes
from megatron.core.models.mimo.model.encode_first.encoder_calls import (
    Called,
    EncoderCalls,
    Modality,
)
from megatron.core.models.mimo.model.encode_first.encoder_work import (
    Dealt,
    InputsOfOthers,
    Job,
    deal,
    encodings_of,
    joined,
)
from megatron.core.models.mimo.model.encoding.idle import gather_parameters_of
from megatron.core.models.mimo.model.grids.wide_rows import split_levels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_DIMENSIONS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Messages of one modality, between its encoders and the ranks that place its rows.

    Attributes:
        inputs: inputs, to the encoders; and back, who encodes what.
        rows: rows, to the language model; and hidden states between the encoders' stages.
        gradients: gradients of both, the other way.
    """

    inputs: Messages
    rows: Messages
    gradients: Messages

    def settle(self) -> None:
        """Wait until all has left."""
        for messages in (self.inputs, self.rows, self.gradients):
            messages.settle()


class EncoderStream:
    """A step of one modality on a rank of its encoders, which has nothing of the language model.

    Args:
        modality: the modality that is encoded.
        lines: to the other ranks of the pool.
        count: micro-batches in the step.
        ahead: micro-batches that its first stage may have encoded before a backward.

    Attributes:
        name: name of the modality.
        window: micro-batches that this rank's stage may have encoded before a backward.
        jobs: jobs of all replicas of the language model in the pool.
        count: micro-batches in the step; 0 where the language model's ranks have none.
        cost: cost of what this rank encodes, and of what the pool does.
    """

    def __init__(self, modality: Modality, lines: Lines, count: int, ahead: int) -> None:
        assert modality.submodule is not None, "this rank encodes"
        assert modality.stage is not None, "this rank encodes"
        self.name = modality.name
        self._modality, self._lines, self._stage = modality, lines, modality.stage
        self._pool, self._owner = modality.pool, modality.pool.owner_of(dist.get_rank())
        self._place = self._pool.stages[self._stage][self._owner].index(dist.get_rank())
        self.window = max(ahead - self._stage, 1)
        # Replicas begin to encode at different times, and gather their weights together.
        gather_parameters_of(modality.submodule)
        self._inputs = InputsOfOthers(modality, lines.inputs, None, count)
        self.jobs = self._inputs.jobs([])
        loads = [0.0] * len(self._pool.owners)
        self._dealt: list[Dealt] = []
        self.count = len(self.jobs) // len(self._pool.replicas)
        for number in range(self.count):
            batches = self._inputs.batches(number)
            jobs = [self.jobs[batch] for batch in batches]
            self._dealt.append(deal(modality, jobs, batches[0], loads))
        self._inputs.tell(joined(self._dealt))
        mine = [n for n, dealt in enumerate(self._dealt) if self._owner in dealt.owners]
        self._last = mine[-1] if mine else None
        self._run = EncoderCalls(modality, self.jobs[0].seed if self.jobs else None)
        self._called: dict[int, list[Called]] = {}
        self._ready: dict[int, list[torch.Tensor]] = {}  # encoded, and not yet given
        self.cost = loads[self._owner], sum(loads)

    def encode(self, before: int) -> None:
        """Encode this rank's share of micro-batches below a number, and keep it."""
        before = min(before, self.count)
        for number in range(before):
            self._encode(number, before)
        self._lines.settle()

    def is_confirmed(self) -> bool:
        """True where the next step is the one that was encoded ahead for."""
        return self._inputs.is_confirmed()

    def forward(self, number: int) -> None:
        """Encode this rank's share of a micro-batch, and send its rows."""
        if number >= self.count:
            return
        self._lines.rows.settle(before=number - self.window)
        if number not in self._ready:
            self._encode(number, self.count)
        outputs = self._ready.pop(number)
        if outputs:
            routes = self._routes(number).forward()
            _send(self._lines.rows, torch.cat(outputs), routes, self._pool, number)

    def _encode(self, number: int, before: int) -> None:
        """Encode a micro-batch, while the inputs of the next one below ``before`` arrive."""
        for one in (number, number + 1):
            if one < before:
                self._inputs.expect(one, self.jobs, self._dealt[one])
        batches = self._inputs.batches(number)
        outputs, kept = [], []
        for call in self._inputs.calls(batches, self.jobs, self._dealt[number]):
            output, called = self._run.forward(call, self._arrived())
            outputs.append(output)
            kept.append(called)
            if not self._modality.is_last:
                self._pass_on(output, number)
        self._ready[number] = outputs if self._modality.is_last else []
        if self._modality.trains:
            self._called[number] = kept

    def backward(self, number: int) -> None:
        """Backward of this rank's share of a micro-batch, once its gradients are there."""
        kept = self._called.pop(number, [])
        if not kept or not self._modality.trains_before(self._stage + 1):
            return
        before = self._modality.trains_before(self._stage)
        for at, (called, grad) in enumerate(zip(kept, self._gradients(number, kept), strict=True)):
            last = number == self._last and at == len(kept) - 1
            grad_hidden = self._run.backward(called, grad, last=last)
            if before:
                assert grad_hidden is not None, "a stage's output depends on its input"
                self._lines.gradients.send(grad_hidden, self._peer(-1), of=number)

    def finish(self) -> None:
        """End the step; a rank that has encoded nothing takes part in reductions all the same."""
        if self._last is None and self._modality.trains:
            output, called = self._run.forward(None)
            self._run.backward(called, torch.zeros_like(output), last=True)
        self._lines.settle()

    def _peer(self, step: int) -> int:
        """The rank of this encoder replica that has the next (1) or previous (-1) stage."""
        return self._pool.stages[self._stage + step][self._owner][self._place]

    def _arrived(self) -> torch.Tensor | None:
        """What the stage before has given, in the order of its calls; None on the first."""
        if self._stage == 0:
            return None
        like = self._modality.like_H
        head = self._lines.rows.receive(like.to(torch.long), [_MOST_DIMENSIONS + 2], self._peer(-1))
        assert head is not None, "a head has numbers"
        dtype, dimensions, *shape = head.wait().tolist()
        hidden = self._lines.rows.receive(
            like.to(_DTYPES[dtype]), shape[:dimensions], self._peer(-1)
        )
        assert hidden is not None, "a call has rows"
        return hidden.wait()

    def _pass_on(self, output: torch.Tensor, number: int) -> None:
        head = [_DTYPES.index(output.dtype), output.dim(), *output.shape]
        head += [0] * (_MOST_DIMENSIONS + 2 - len(head))
        self._lines.rows.send(torch.tensor(head, device=output.device), self._peer(1), of=number)
        self._lines.rows.send(output, self._peer(1), of=number)

    def _routes(self, number: int) -> RowRoutes:
        batches, dealt = self._inputs.batches(number), self._dealt[number]
        jobs = [self.jobs[batch] for batch in batches]
        encodings, sizes = encodings_of(jobs, dealt, len(self._pool.owners), batches[0])
        return RowRoutes(self._pool, dist.get_rank(), encodings, sizes[self._owner])

    def _gradients(self, number: int, kept: Sequence[Called]) -> Sequence[torch.Tensor]:
        """Gradients of the outputs of this rank's calls of a micro-batch."""
        likes = [called.like for called in kept if called.like is not None]
        if self._modality.is_last:
            routes = self._routes(number).backward()
            width, like_H = likes[0].size(1), self._modality.like_H
            coming = _expect(self._lines.gradients, like_H, width, routes, self._pool)
            grad_NW = _taken(coming, like_H.new_zeros(routes.size, width), routes)
            return grad_NW.split_with_sizes([like.size(0) for like in likes])
        coming = [
            self._lines.gradients.receive(
                self._modality.like_H.to(like.dtype), like.shape, self._peer(1)
            )
            for like in likes
        ]
        return [one.wait() for one in coming if one is not None]


class ArrivingRows:
    """A step of one modality on a rank of the language model that places rows.

    Args:
        modality: a modality with its encoders on other ranks.
        lines: to the other ranks of the pool.
        jobs: jobs of this rank's replica, one for each micro-batch.
        replica: number of this replica.
        ahead: micro-batches whose inputs are sent before they are placed.
    """

    def __init__(
        self, modality: Modality, lines: Lines, jobs: Sequence[Job], replica: int, ahead: int
    ) -> None:
        self._modality, self._lines, self._jobs, self._ahead = modality, lines, jobs, ahead
        self._pool = modality.pool
        self._inputs = InputsOfOthers(modality, lines.inputs, replica, len(jobs))
        self._inputs.jobs(jobs)
        dealt = self._inputs.tell(None)
        own = [self._inputs.batch(number, replica) for number in range(len(jobs))]
        self._batches = own
        self._dealt = [dealt.part(batch) for batch in own]
        self._sent = 0
        self._send_inputs(ahead)
        self._back: dict[int, tuple[Routes, torch.Tensor]] = {}
        self._coming: dict[int, tuple[RowRoutes, Routes, list[Message | None]]] = {}

    def confirm(self, yes: bool) -> None:
        """Tell the encoders whether the step that they have begun comes next."""
        self._inputs.confirm(yes)

    def take(self, number: int) -> Encoded:
        """The rows of a micro-batch that this rank places; they come in the order of numbers.

        Their gradient leaves as soon as backward has it.
        """
        self._send_inputs(number + 1 + self._ahead)
        for one in (number, number + 1):
            self._expect(one)
        every, routes, coming = self._coming.pop(number)
        leaf = _taken(coming, self._empty(routes.size), routes)
        if self._modality.trains:
            leaf.requires_grad_()  # empty ones too: all ranks enter what collectives backward has
        if self._modality.trains and routes.size:
            self._back[number] = every.backward(), leaf
            give_back = partial(self._give_back, number)
            leaf.register_post_accumulate_grad_hook(give_back)  # type: ignore[no-untyped-call]
        return split_levels(leaf, self._modality.levels)

    def finish(self) -> None:
        """End the step; the gradient of rows that backward has not reached is zero."""
        for number, (_, leaf) in sorted(self._back.items()):
            leaf.grad = torch.zeros_like(leaf)
            self._give_back(number, leaf)
        self._lines.settle()

    def _send_inputs(self, before: int) -> None:
        """Send the inputs of micro-batches below a number."""
        for number in range(self._sent, min(before, len(self._jobs))):
            self._inputs.send(number, self._jobs[number].inputs, self._dealt[number])
            self._sent = number + 1

    def _expect(self, number: int) -> None:
        if number in self._coming or number >= len(self._jobs):
            return
        owners = len(self._pool.owners)
        encodings, _ = encodings_of(
            [self._jobs[number]], self._dealt[number], owners, self._batches[number]
        )
        every = RowRoutes(self._pool, dist.get_rank(), encodings, 0)
        routes, like = every.forward(), self._modality.like_H
        width = self._empty(0).size(1)
        coming = _expect(self._lines.rows, like, width, routes, self._pool)
        self._coming[number] = every, routes, coming

    def _give_back(self, number: int, leaf: torch.Tensor) -> None:
        routes, _ = self._back.pop(number)
        grad_NW, leaf.grad = leaf.grad, None
        assert grad_NW is not None, "it was accumulated"
        _send(self._lines.gradients, grad_NW, routes, self._pool, number)

    def _empty(self, rows: int) -> torch.Tensor:
        like_H = self._modality.like_H
        return like_H.new_zeros(rows, (1 + self._modality.levels) * like_H.numel())


def _send(
    messages: Messages, rows_NW: torch.Tensor, routes: Routes, pool: Pool, number: int
) -> None:
    """Send the rows that this rank gives others."""
    for rank, index_n in zip(pool.ranks, routes.give, strict=True):
        if index_n.numel():
            given_nW = rows_NW.index_select(0, index_n.to(rows_NW.device))
            messages.send(given_nW, rank, of=number)


def _expect(
    messages: Messages, like: torch.Tensor, width: int, routes: Routes, pool: Pool
) -> list[Message | None]:
    """Ask for the rows [n, width] that others give this rank."""
    return [
        messages.receive(like, [index_n.numel(), width], rank)
        for rank, index_n in zip(pool.ranks, routes.take, strict=True)
    ]


def _taken(
    coming: Sequence[Message | None], empty_NW: torch.Tensor, routes: Routes
) -> torch.Tensor:
    """The rows that this rank has asked for, once they are there, each in its place."""
    for message, index_n in zip(coming, routes.take, strict=True):
        if message is not None:
            empty_NW.index_copy_(0, index_n.to(empty_NW.device), message.wait())
    return empty_NW
