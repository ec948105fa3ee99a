"""Which samples a micro-batch was made of, found from its position when it is asked for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.mimo.data.sample import Sample

if TYPE_CHECKING:
    from megatron.mimo.training.data import MicroBatches, SampleRange

__all__ = ["BROKEN_MEDIA", "SampleFinder"]

BROKEN_MEDIA = "media of its samples hold values that are not finite"
_SHOWN = 16  # names


class SampleFinder:
    """Names the samples of this rank's training micro-batches.

    Attributes:
        stream: what the rank reads, and from where; None on ranks that read nothing.
    """

    def __init__(self, args: Namespace) -> None:
        self.stream: tuple[MicroBatches, SampleRange] | None = None
        self._args = args

    def text(self, micro_batch: int) -> str:
        """The samples of a micro-batch of the iteration that is being computed, for a human.

        Those with media that are not finite stand alone, if there are any. Samples are read again
        for their names; nothing of this is kept during training.
        """
        if self.stream is None:
            return "its samples are known to the ranks that read them"
        batches, numbers = self.stream
        start = self._args.consumed_train_samples
        ahead = micro_batch * numbers.dp_size + numbers.dp_rank
        first = start + ahead * numbers.micro_batch
        names, broken = [], []
        for number in range(first, first + numbers.micro_batch):
            index = number % len(batches)
            for sample in _samples(batches, index):
                named = f"{sample.name}" if isinstance(sample, Sample) else f"number {index}"
                names.append(named)
                if isinstance(sample, Sample) and _is_broken(sample):
                    broken.append(named)
        if broken:
            return f"{BROKEN_MEDIA}: {_list(broken)}"
        return f"its samples are {_list(names)}"


def _samples(batches: MicroBatches, index: int) -> Iterator[Any]:
    try:
        item = batches.read(index)
    except Exception:  # noqa: BLE001 - it was read before; its number is all there is
        yield None
        return
    if isinstance(item, tuple):
        yield from item
    else:
        yield item


def _is_broken(sample: Sample) -> bool:
    return any(
        tensor.is_floating_point() and not bool(tensor.isfinite().all())
        for item in sample.media
        for tensor in item.inputs.values()
        if hasattr(tensor, "isfinite")
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
