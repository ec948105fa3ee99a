"""Tensors sent from one rank to another; the sender does not wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(kw_only=True, eq=False)
class Message:
    """A tensor that is leaving this rank or coming to it.

    Attributes:
        tensor: the tensor itself.
        work: its handle; None until it is on its way.
        of: number of the micro-batch that it belongs to.
    """

    tensor: torch.Tensor
    work: Any = None
    of: int = 0

    def wait(self) -> torch.Tensor:
        """The tensor, once it has left or is there; on a GPU, its stream waits."""
        self.work.wait()
        return self.tensor


class Messages:
    """Messages of one kind between ranks; those of a pair arrive in the order in which they leave.

    Sender and receiver know which messages there are, and of which shape and dtype. An empty
    tensor is not sent.

    Args:
        group: group of all ranks that send or receive.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._leaving: deque[Message] = deque()
        self._together: list[tuple[Message, Any]] | None = None

    def send(self, tensor: torch.Tensor, rank: int, *, of: int = 0) -> None:
        """Send a tensor to a rank; ``of`` is the number of its micro-batch, ascending."""
        if tensor.numel():
            message = Message(tensor=tensor.detach().contiguous(), of=of)
            self._leaving.append(message)
            self._start(message, dist.isend, rank)

    def receive(self, like: torch.Tensor, shape: Sequence[int], rank: int) -> Message | None:
        """Expect a tensor of ``like``'s dtype and device from a rank; None where it is empty."""
        message = Message(tensor=like.new_empty(*shape))
        if not message.tensor.numel():
            return None
        self._start(message, dist.irecv, rank)
        return message

    @contextmanager
    def together(self) -> Iterator[None]:
        """Start all that is sent and received within this context together, at its end.

        Ranks that send to each other at the same time need it.
        """
        self._together = []
        yield
        begun, self._together = self._together, None
        if begun:
            works = dist.batch_isend_irecv([operation for _, operation in begun])
            for number, (message, _) in enumerate(begun):
                message.work = works[number if len(works) == len(begun) else -1]

    def settle(self, before: int | None = None) -> None:
        """Wait until all messages of micro-batches below ``before`` have left; None for all."""
        while self._leaving and (before is None or self._leaving[0].of < before):
            self._leaving.popleft().wait()

    def _start(self, message: Message, operation: Any, rank: int) -> None:
        # As bytes: not every backend knows every dtype.
        content = message.tensor.view(-1).view(torch.uint8)
        if self._together is None:
            message.work = operation(content, rank, group=self._group)
        else:
            started = dist.P2POp(operation, content, rank, self._group)
            self._together.append((message, started))
