"""Finds the samples of a micro-batch from its position, when they are asked for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from megatron.mimo.data.sample import Sample

if TYPE_CHECKING:
    from megatron.mimo.data.global_batches.planned_batches import PlannedBatches
    from megatron.mimo.training.data import MicroBatches, SampleRange
    from megatron.mimo.training.plans import RankPlan

__all__ = ["BROKEN_MEDIA", "Origins", "PlannedOrigins", "RangeOrigins", "SampleFinder"]

BROKEN_MEDIA = "media of its samples hold values that are not finite"
_SHOWN = 16  # names


class Origins(Protocol):
    """Reads again what a micro-batch of the iteration that is being computed was made of."""

    def samples(self, micro_batch: int) -> Iterator[tuple[str, Any]]:
        """Its samples, each with a name to fall back on; None for one that cannot be read."""
        ...


class RangeOrigins:
    """The samples of a stream that reads a range of sample numbers."""

    def __init__(self, batches: MicroBatches, numbers: SampleRange, args: Namespace) -> None:
        self._batches = batches
        self._numbers = numbers
        self._args = args

    def samples(self, micro_batch: int) -> Iterator[tuple[str, Any]]:
        """As ``Origins``."""
        numbers = self._numbers
        ahead = micro_batch * numbers.dp_size + numbers.dp_rank
        first = self._args.consumed_train_samples + ahead * numbers.micro_batch
        for number in range(first, first + numbers.micro_batch):
            index = number % len(self._batches)
            try:
                item = self._batches.read(index)
            except Exception:  # noqa: BLE001 - it was read before; its number is all there is
                item = None
            for sample in item if isinstance(item, tuple) else (item,):
                yield f"number {index}", sample


class PlannedOrigins:
    """The samples of a stream that follows a plan."""

    def __init__(self, batches: PlannedBatches, plan: RankPlan) -> None:
        self._batches = batches
        self._plan = plan

    def samples(self, micro_batch: int) -> Iterator[tuple[str, Any]]:
        """As ``Origins``."""
        for item in self._plan.micro_batch(micro_batch):
            try:
                found: list[Any] = self._batches.samples(item)
            except Exception:  # noqa: BLE001 - it was read before; its numbers are all there is
                found = [None] * len(item)
            for planned, sample in zip(item, found, strict=True):
                yield "record {} of file {} of source {}".format(*planned.draw[2::-1]), sample


class SampleFinder:
    """Names the samples of this rank's training micro-batches.

    Attributes:
        stream: what the rank reads; None on ranks that read nothing.
    """

    def __init__(self) -> None:
        self.stream: Origins | None = None

    def text(self, micro_batch: int) -> str:
        """The samples of a micro-batch of the iteration that is being computed, for a human.

        Those with media that are not finite stand alone, if there are any. Samples are read again
        for their names; nothing of this is kept during training.
        """
        if self.stream is None:
            return "its samples are known to the ranks that read them"
        names, broken = [], []
        for fallback, sample in self.stream.samples(micro_batch):
            named = sample.name if isinstance(sample, Sample) else fallback
            names.append(named)
            if isinstance(sample, Sample) and _is_broken(sample):
                broken.append(named)
        if broken:
            return f"{BROKEN_MEDIA}: {_list(broken)}"
        return f"its samples are {_list(names)}"


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
