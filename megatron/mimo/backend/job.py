"""The end of this process's job, and the device on which its ranks meet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["end_job", "leave_job", "naming_the_device"]


def end_job() -> None:
    """Ends the process groups of a rank that has done its work; harmless where there are none.

    Every rank calls it, and none before the others have got what they wait for.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave_job() -> None:
    """Ends the process groups of a rank that has failed, and waits for nobody.

    NCCL's are aborted: to destroy them is to wait for what the other ranks may never send.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if "nccl" in dist.get_backend():
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def naming_the_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``barrier`` that meets on the device which this process has chosen, where NCCL guesses.

    The other remedy that torch names, ``init_process_group(device_id=...)``, is none for a job of
    several processes: it makes every later group a split of the first, in which all ranks take
    part, and of a gloo group, of which Megatron makes many, the members do not.
    """

    @functools.wraps(original)
    def barrier(
        group: Any = None, async_op: bool = False, device_ids: Any = None, **settings: Any
    ) -> Any:
        if device_ids is None and _uses_nccl(group):
            device_ids = [torch.cuda.current_device()]
        return original(group, async_op, device_ids, **settings)

    return barrier


def _uses_nccl(group: Any) -> bool:
    if group is None:
        return dist.is_initialized() and "nccl" in dist.get_backend()
    return isinstance(group, dist.ProcessGroup) and "nccl" in dist.get_backend(group)
