"""gloo process groups that scale to the many groups a Megatron job makes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_DEFAULT_TIMEOUT = timedelta(minutes=30)


@functools.cache
def _device_of_process(pid: int) -> Any:
    return _stock_gloo().create_default_device()


def _stock_gloo() -> Any:
    from torch._C._distributed_c10d import ProcessGroupGloo

    return ProcessGroupGloo


def sharing_one_device(original: Any) -> Any:
    """A ``ProcessGroupGloo`` whose groups share this process's one device.

    A device is a listening socket and a thread that serves all its connections; by default every
    group opens its own. A group also keeps one worker thread instead of two: its collectives are
    issued in the same order on every rank, so running them one after another cannot block.
    """

    class SharedDeviceGloo(original):
        """``ProcessGroupGloo`` on the process's shared device."""

        def __init__(
            self,
            store: Any,
            rank: int,
            size: int,
            options: Any = None,
            *,
            timeout: timedelta = _DEFAULT_TIMEOUT,
            **settings: Any,
        ) -> None:
            if isinstance(options, timedelta):
                timeout, options = options, None
            if options is None:
                options = original._Options()
                options._timeout = timeout
                options._threads = 1
                for name, value in settings.items():
                    setattr(options, name, value)
            options._devices = [_device_of_process(os.getpid())]
            super().__init__(store, rank, size, options)

    return SharedDeviceGloo


def connected_on_return(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``new_group`` that reads "nccl" as gloo and returns once every member is connected.

    Collective over all ranks, as ``new_group`` is; the barrier is among the members of a group that
    has several. gloo connects while it constructs the group: without the barrier a fast member can
    use and destroy the group while another is still connecting to it.
    """

    @functools.wraps(original)
    def new_group(*args: Any, **keywords: Any) -> Any:
        if len(args) > 2 and args[2] == "nccl":
            args = (*args[:2], "gloo", *args[3:])
        if keywords.get("backend") == "nccl":
            keywords["backend"] = "gloo"
        group = original(*args, **keywords)
        is_member = isinstance(group, dist.ProcessGroup)
        if is_member and group.size() > 1 and dist.get_backend(group) == "gloo":
            dist.barrier(group=group)
        return group

    return new_group
