"""Counting what makes the host wait for the device.

On a GPU each of these stalls the queue of kernels; on CPU they can be counted all the same, which
is how a run without a GPU proves that a forward and a backward pass are free of them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = frozenset(
    {
        "aten::_local_scalar_dense",  # .item(), bool(), int(), if tensor:
        "aten::nonzero",
        "aten::masked_select",
        "aten::masked_scatter_backward",  # holds a masked_select
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::unique_dim",
        "aten::equal",  # torch.equal answers a Python bool
        "aten::bincount",
    }
)
_INDEXING = frozenset(
    {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
)
_FILLING = frozenset({"aten::masked_fill", "aten::masked_fill_"})


class HostSyncCounter(TorchDispatchMode):
    """Counts operations that wait for the device while it is active, backward included.

    Boolean-mask indexing counts (it looks up how many elements are set), and so does a copy from
    a device to the host. ``x[mask] = 0`` does not: one mask and one number are a masked fill, which
    older torch (before 2.15) shows as ``index_put_``. A fill with a number that the device holds
    waits for that number.

    Attributes:
        counts: operation name -> occurrences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        # What torch made of Python numbers. They are on the host with a GPU too, unlike any other
        # tensor of a run on CPU. Kept, so that no other tensor takes their ids.
        self._numbers: dict[int, torch.Tensor] = {}

    @property
    def total(self) -> int:
        """All waits seen so far."""
        return self.counts.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name().split(".")[0]
        if name in _WAITING or self._waits_for_operands(name, args):
            self.note(name)
        result = func(*args, **(kwargs or {}))
        if _is_number(name, result):
            self._numbers[id(result)] = result
        if name in ("aten::_to_copy", "aten::copy_") and _leaves_device(args, result):
            self.note(f"{name} to host")
        return result

    def note(self, wait: str) -> None:
        """One wait is seen, while the operation that waits runs."""
        self.counts[wait] += 1

    def _waits_for_operands(self, name: str, args: tuple[Any, ...]) -> bool:
        if name in _FILLING:
            return not self._is_on_host(args[2], args[0])
        if name not in _INDEXING or not _has_mask(args[1]):
            return False
        is_fill = name != "aten::index" and _is_one_mask(args[1]) and not any(args[3:4])
        return not (is_fill and self._is_on_host(args[2], args[0]))

    def _is_on_host(self, value: Any, filled: torch.Tensor) -> bool:
        """Whether one number is known without asking the device that the filled tensor is on."""
        if not isinstance(value, torch.Tensor):
            return True
        if filled.device.type != "cpu":
            return value.numel() == 1 and value.device.type == "cpu"
        return id(value) in self._numbers


def _is_number(name: str, result: Any) -> bool:
    """Whether torch made this of a Python number.

    The backward pass of a masked fill with a number fills with a zero that it makes on the number's
    device; made by a model, ``torch.zeros(())`` would be on the device of the model.
    """
    if name == "aten::zeros":
        return result.dim() == 0 and torch._C._current_graph_task_id() >= 0
    return name == "aten::lift_fresh" and bool(result.numel() == 1)


def _is_one_mask(indices: Any) -> bool:
    return sum(index is not None for index in indices) == 1


def _has_mask(indices: Any) -> bool:
    return any(
        torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in indices
    )


def _leaves_device(args: tuple[Any, ...], result: torch.Tensor) -> bool:
    source = next(
        (argument for argument in reversed(args[:2]) if torch.is_tensor(argument)), result
    )
    return source.device.type != "cpu" and result.device.type == "cpu"
