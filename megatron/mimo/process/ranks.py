"""What the ranks of a job tell each other, before they have process groups and after.

Whose a folder is and which checkpoint a run begins with are decided before anything is built, and
all ranks have to come to the same answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["Ranks", "running_job", "starting_job"]

_TIMEOUT = timedelta(minutes=60)  # in which the slowest rank has answered
_rounds = count()
_kept: list[Any] = []  # rank 0's is the server that the process groups will use too


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Those that decide something together; by default this process alone.

    Attributes:
        rank: of this process.
        size: how many there are.
        exchange: gives each rank's value, in the order of ranks; None for one alone.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] | None = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order. All ranks call it, in the same order."""
        return [value] if self.exchange is None else self.exchange(value)


def starting_job() -> Ranks:
    """The job that the environment describes (``launcher.join_job``); no process groups exist.

    All ranks call it, and then exchange values of JSON through the store at ``MASTER_ADDR`` and
    ``MASTER_PORT``, which the process groups will use.

    Raises:
        ConfigError: the ranks do not find each other.
    """
    rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
    if size <= 1:
        return Ranks()
    import torch.distributed as dist

    try:
        if not _kept:
            _kept.append(next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))[0])
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"rank {rank} does not find the others at {place}: {str(error).splitlines()[0]}; "
            "start with torchrun, or set MASTER_ADDR and MASTER_PORT to a free port of rank 0's "
            "host"
        ) from error
    store = dist.PrefixStore("starting", _kept[0])

    def exchange(value: Any) -> list[Any]:
        number = next(_rounds)
        try:
            store.set(f"{number}/{rank}", json.dumps(value))
            values = [json.loads(store.get(f"{number}/{other}")) for other in range(size)]
            if store.add(f"{number}/read", 1) == size:
                store.set(f"{number}/done", "")
            if rank == 0:  # whose store may end with it
                store.wait([f"{number}/done"])
        except RuntimeError as error:
            raise ConfigError(
                f"rank {rank} waited for the others before the start, and one did not answer: "
                f"{str(error).splitlines()[0]}; its own message says why"
            ) from error
        return values

    return Ranks(rank=rank, size=size, exchange=exchange)


def running_job() -> Ranks:
    """The ranks of the process groups; this process alone where there are none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()

    def exchange(value: Any) -> list[Any]:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), exchange=exchange)
