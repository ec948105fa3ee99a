"""One micro-batch, read on one rank of a tensor-parallel group, on all of them.

A batch is any picklable nest of containers and dataclasses (``AlignmentPlan`` included) with
tensors in it. It travels as one byte buffer: a pickle in which every tensor is a reference, then
the tensors' bytes. On an accelerator that is one copy from the host and one collective.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mimo.process.failure import EchoedError

__all__ = ["broadcast_batch", "move", "pack", "unpack"]

_ALIGNMENT = 16  # bytes; every dtype may be viewed in place
_FAILED = -1


class _Pickler(pickle.Pickler):
    """Takes the tensors out; what is left is small."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._end = 0

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        tensor = obj.detach().contiguous()
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._end = start + tensor.nbytes
        self.tensors.append(tensor)
        return start, tensor.dtype, tuple(tensor.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, body: Tensor) -> None:
        super().__init__(file)
        self._body = body

    def persistent_load(self, pid: Any) -> Tensor:
        start, dtype, shape = pid
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device=self._body.device)
        return self._body[start : start + size].view(dtype).view(shape)


def pack(batch: Any) -> tuple[bytes, Tensor]:
    """Split a batch of host tensors into a header and uint8 [bytes] with all tensors' content."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    total, starts = 0, []
    for tensor in pickler.tensors:
        start = -(-total // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        total = start + tensor.nbytes
    body = torch.empty(total, dtype=torch.uint8)
    for start, tensor in zip(starts, pickler.tensors, strict=True):
        if tensor.nbytes:
            body[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return file.getvalue(), body


def unpack(header: bytes, body: Tensor) -> Any:
    """The inverse of ``pack``; the tensors are views of ``body``, on its device."""
    return _Unpickler(io.BytesIO(header), body).load()


def move(batch: Any, device: torch.device) -> Any:
    """A batch of host tensors on ``device``, in one copy."""
    if device.type == "cpu":
        return batch
    header, body = pack(batch)
    return unpack(header, body.pin_memory().to(device, non_blocking=True))


def broadcast_batch(load: Callable[[], Any], group: dist.ProcessGroup, device: torch.device) -> Any:
    """Load a batch on the group's first rank and hand it to every rank of the group, on ``device``.

    Collective over ``group``: every rank calls it, ``load`` runs on the first one only.

    Args:
        load: returns the batch, host tensors.
        group: the tensor-parallel group.
        device: where the tensors are wanted; the group's backend has to serve it.

    Raises:
        EchoedError: on the other ranks, with the message of whatever ``load`` raised on the first,
            where the error itself is raised.
    """
    if group.size() == 1:
        return move(load(), device)
    if group.rank() == 0:
        return _send(load, group, device)
    return _receive(group, device)


def _send(load: Callable[[], Any], group: dist.ProcessGroup, device: torch.device) -> Any:
    failure: Exception | None = None
    try:
        header, body = pack(load())
    except Exception as error:  # noqa: BLE001 - the other ranks are waiting
        failure = error
        header, body = (
            f"{type(error).__name__}: {error}".encode(),
            torch.empty(0, dtype=torch.uint8),
        )
    sizes = torch.tensor([len(header), _FAILED if failure else len(body)], device=device)
    dist.broadcast(sizes, group_src=0, group=group)
    head = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    pad = -len(head) % _ALIGNMENT
    whole = torch.cat([head, head.new_zeros(pad), body]).to(device)
    dist.broadcast(whole, group_src=0, group=group)
    if failure:
        raise failure
    return unpack(header, whole[len(header) + pad :])


def _receive(group: dist.ProcessGroup, device: torch.device) -> Any:
    sizes = torch.empty(2, dtype=torch.int64, device=device)
    dist.broadcast(sizes, group_src=0, group=group)
    header_size, body_size = sizes.tolist()
    start = -(-header_size // _ALIGNMENT) * _ALIGNMENT
    whole = torch.empty(start + max(body_size, 0), dtype=torch.uint8, device=device)
    dist.broadcast(whole, group_src=0, group=group)
    header = bytes(whole[:header_size].cpu().numpy())
    if body_size == _FAILED:
        raise EchoedError(f"the rank that reads the data failed: {header.decode()}")
    return unpack(header, whole[start:])
