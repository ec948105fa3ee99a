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


class HostSyncCounter(TorchDispatchMode):
    """Counts operations that wait for the device while it is active, backward included.

    Boolean-mask indexing counts (it looks up how many elements are set), and so does a copy from
    a device to the host.

    Attributes:
        counts: operation name -> occurrences.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

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
        if name in _WAITING or (name in _INDEXING and _has_mask(args[1])):
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_") and _leaves_device(args, result):
            self.counts[f"{name} to host"] += 1
        return result


def _has_mask(indices: Any) -> bool:
    return any(
        torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in indices
    )


def _leaves_device(args: tuple[Any, ...], result: torch.Tensor) -> bool:
    source = next(
        (argument for argument in reversed(args[:2]) if torch.is_tensor(argument)), result
    )
    return source.device.type != "cpu" and result.device.type == "cpu"
