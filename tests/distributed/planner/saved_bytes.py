"""What autograd keeps for the backward pass, counted as it comes and goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SavedBytes:
    """Storages that saved tensors hold, each once; parameters and buffers are not counted.

    Attributes:
        now: bytes held.
        peak: the most that were held at once.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._apart: set[int] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what is saved within this context."""
        self.leave_out(model)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def leave_out(self, model: nn.Module) -> None:
        """Do not count parameters and buffers."""
        inner = [*model.children()] or [model]  # a wrapper has buffers of another kind
        tensors = [one for part in inner for one in (*part.parameters(), *part.buffers())]
        self._apart |= {one.untyped_storage().data_ptr() for one in tensors}

    def _pack(self, tensor: Tensor) -> Any:
        return _Held(self, tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._apart:
            return
        if not self._holders[storage.data_ptr()]:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._holders[storage.data_ptr()] += 1

    def remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._apart:
            return
        self._holders[storage.data_ptr()] -= 1
        if not self._holders[storage.data_ptr()]:
            self.now -= storage.nbytes()


class _Held:
    def __init__(self, counts: SavedBytes, tensor: Tensor) -> None:
        self.tensor, self._counts = tensor, counts
        counts.add(tensor)

    def __del__(self) -> None:
        self._counts.remove(self.tensor)
