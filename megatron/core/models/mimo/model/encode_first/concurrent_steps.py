"""Steps in which encoders on ranks of their own run beside the language model's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.encode_first.encode_ahead import NextStep, peeked
from megatron.core.models.mimo.model.encode_first.encoder_calls import Modality
from megatron.core.models.mimo.model.encode_first.encoder_work import Job
from megatron.core.models.mimo.model.encode_first.in_flight import most_in_flight
from megatron.core.models.mimo.model.encode_first.media_units import Inputs
from megatron.core.models.mimo.model.encode_first.modality_pools import ModalityPools
from megatron.core.models.mimo.model.encode_first.row_stream import ArrivingRows, EncoderStream
from megatron.core.models.mimo.model.encode_first.step_batches import MicroBatch, StepBatches

Seen = Callable[[str, Inputs, int], None]
AHEAD = 1  # micro-batches that encoders are ahead of what the language model's pipeline holds


class ConcurrentSteps:
    """This rank's side of every step: that of the language model, or that of encoders.

    Args:
        model: this rank's first chunk.
        pools: the pools of its modalities.
        count_ahead: gives the number of micro-batches of the next step, of which frozen encoders
            encode the first in this one; None for none. Once the last rows of a step have arrived,
            the ranks that place them send the encoders these inputs. No message is on its way when
            a step ends, so that an evaluation may come between; a step that is repeated drops what
            was begun.

    Attributes:
        seen: is called on one rank of each pool with what is encoded in training: the modality,
            the inputs of a micro-batch (large tensors without content), how many rows they give.
    """

    def __init__(
        self, model: MimoModel, pools: ModalityPools, count_ahead: Callable[[], int] | None
    ) -> None:
        self._model, self._pools, self._count_ahead = model, pools, count_ahead
        self._begun: dict[str, EncoderStream] = {}
        self.seen: Seen | None = None

    def language(
        self,
        step: NextStep,
        run_language: Callable[[Iterator[MicroBatch]], Any],
        begin: Callable[[NextStep], None] | None,
        source: Any,
    ) -> Any:
        """A step on a rank of the language model; what its schedule returns.

        Args:
            step: the step's micro-batches.
            run_language: the schedule, given the micro-batches with their rows.
            begin: is given the next step, once encoders have its inputs; None where they are to
                begin nothing.
            source: gives micro-batches.
        """
        batches, count = step.batches, len(step.given)
        arriving: dict[str, ArrivingRows] = {}
        for modality in self._pools.modalities:
            # Drawn in any case: the generator is checkpointed.
            seed = self._pools.draw_seed(modality, trains=self._model.training)
            begun = step.by_modality.get(modality.name)
            if begun is not None:
                begun.confirm(True)
                arriving[modality.name] = begun
            elif self._pools.reads:
                arriving[modality.name] = self._arriving(modality, batches, count, seed)
        batches.cut_plans(reads=self._pools.reads)

        def arrive() -> Iterator[MicroBatch]:
            for number, batch in enumerate(batches.batches):
                if arriving:
                    rows = {name: one.take(number) for name, one in arriving.items()}
                    batch["encoded_rows"] = rows
                    if begin is not None and number == count - 1:
                        self._begin(begin, source)
                yield batch

        reports = run_language(arrive())
        for one in arriving.values():
            one.finish()
        return reports

    def encoders(self, count: int, costs: dict[str, tuple[float, float]], *, trains: bool) -> None:
        """A step on a rank of encoders alone: backward follows forward by each stream's window.

        Args:
            count: micro-batches in the step.
            costs: modality -> what this rank encodes and what its pool does; is filled.
            trains: this is no evaluation.
        """
        begun: dict[str, EncoderStream] = {}
        if trains:
            begun = {name: stream for name, stream in self._begun.items() if stream.is_confirmed()}
            self._begun = {}
        streams = []
        for modality in self._pools.modalities:
            stream = begun.get(modality.name) or self._stream(modality, count)
            costs[modality.name] = stream.cost
            streams.append(stream)
            if trains and self.seen is not None:
                _tell(self.seen, modality, stream.jobs)
        behind = max((stream.window for stream in streams), default=1) - 1
        for number in range(count + behind):
            for stream in streams:
                stream.forward(number)
            for stream in streams:
                stream.backward(number - stream.window + 1)
        for stream in streams:
            stream.finish()
        ahead = self._count_ahead() if trains and self._count_ahead is not None else 0
        for modality in self._pools.modalities if ahead else []:
            if modality.goes_ahead:
                stream = self._stream(modality, ahead)
                if stream.count:
                    stream.encode(most_in_flight(self._model.config, ahead) + AHEAD)
                    self._begun[modality.name] = stream

    def _stream(self, modality: Modality, count: int) -> EncoderStream:
        ahead = most_in_flight(self._model.config, count) + AHEAD + len(modality.trainable) - 1
        return EncoderStream(modality, self._pools.lines[modality.name], count, ahead)

    def _arriving(
        self, modality: Modality, batches: StepBatches, count: int, seed: int | None
    ) -> ArrivingRows:
        replica = self._pools.replica
        assert replica is not None, "this rank has the language model"
        jobs = batches.jobs(modality.name, replica, seed)
        ahead = most_in_flight(self._model.config, count) + AHEAD
        return ArrivingRows(modality, self._pools.lines[modality.name], jobs, replica, ahead)

    def _begin(self, begin: Callable[[NextStep], None], source: Any) -> None:
        """Send frozen encoders the inputs that the next step begins with."""
        frozen = [modality for modality in self._pools.modalities if modality.goes_ahead]
        count = self._count_ahead() if frozen and self._count_ahead is not None else 0
        if not count:
            return
        given = peeked(source, count)
        batches = StepBatches(self._model, [dict(batch) for batch in given])
        known = {one.name: self._arriving(one, batches, count, None) for one in frozen}
        if given:
            begin(NextStep(given=given, batches=batches, by_modality=known))


def _tell(seen: Seen, modality: Modality, jobs: Sequence[Job]) -> None:
    """Tell ``seen``, on the pool's first rank, of all that the pool has to encode."""
    if dist.get_rank() == modality.pool.stages[0][0][0]:
        for job in jobs:
            if job.inputs is not None:
                seen(modality.name, job.inputs, job.placement.rows)
