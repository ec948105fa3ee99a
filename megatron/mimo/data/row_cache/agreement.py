"""Agreement of context-parallel ranks on the media that all of them miss in an encoder's cache.

They divide the work on these. The ranks read the same batches, but each at its own time, while
others write to the cache, so that one may find what another misses: what only some ranks miss,
each of these encodes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megatron.mimo.data.micro_batches.batch import Batch
from megatron.mimo.data.row_cache.lookup import KEYS, SHARED
from megatron.mimo.process.failure import EchoedError

__all__ = ["agreed"]

Opened = Callable[[], Iterator[Batch]]


def agreed(batches: Opened, group: dist.ProcessGroup) -> Opened:
    """The same batches, with the media that all ranks miss under ``SHARED``.

    Each batch is collective over the group; an error of one rank is raised on all.

    Args:
        batches: looked up in caches; the same on all ranks but for what was found.
        group: of a backend for host memory, and used for nothing else.
    """

    def opened() -> Iterator[Batch]:
        inner = batches()
        while True:
            batch, failure = Batch(), None
            try:
                batch = next(inner)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - the other ranks are waiting
                failure = error
            yield _agreed(batch, failure, group)

    return opened


def _agreed(batch: Batch, failure: Exception | None, group: dist.ProcessGroup) -> Batch:
    inputs: dict[str, Any] = batch.get("modality_inputs") or {}
    mine = {
        (modality, encoder): arguments[KEYS]
        for modality, encoders in inputs.items()
        for encoder, arguments in encoders.items()
        if KEYS in arguments
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, str(failure) if failure else mine, group=group)
    if failure is not None:
        raise failure
    told = next((one for one in everyone if isinstance(one, str)), None)
    if told is not None:
        raise EchoedError(f"a rank that reads the same data failed: {told}")
    shared = {
        place: [at for at, key in enumerate(keys) if all(key in one[place] for one in everyone)]
        for place, keys in mine.items()
    }
    marked = {
        modality: {
            encoder: arguments | {SHARED: shared[modality, encoder]}
            if (modality, encoder) in shared
            else arguments
            for encoder, arguments in encoders.items()
        }
        for modality, encoders in inputs.items()
    }
    return batch | ({"modality_inputs": marked} if inputs else {})
