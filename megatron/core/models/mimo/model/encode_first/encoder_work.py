"""What is to be encoded in a step, who encodes it, and how its inputs get there.

The ranks of one replica of the language model have the same inputs. Ranks that encode for a
replica that is not their own are told of these by the replica's speaker: of all of them a header,
from which every rank of the encoder finds out who encodes what, and then the content of what they
encode themselves.

Legend: N rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.balance import deal_out
from megatron.core.models.mimo.comm.messages import Message, Messages
from megatron.core.models.mimo.comm.nests import (
    filled,
    header_of,
    large_bytes,
    read_header,
    size_of,
)
from megatron.core.models.mimo.comm.row_routes import Encoding, Placement
from megatron.core.models.mimo.model.batch.checks import check_count
from megatron.core.models.mimo.model.encode_first.encoder_calls import Modality
from megatron.core.models.mimo.model.encode_first.media_units import (
    Call,
    Inputs,
    Unit,
    calls_of,
    part_of,
    renumbered,
    units_of,
)
from megatron.core.models.mimo.model.encoding.encode import is_empty


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one replica of the language model has to encode in one micro-batch.

    Attributes:
        replica: its data-parallel index.
        inputs: inputs of all encoders; None without any. Large tensors are on "meta" where they
            are not this rank's.
        placement: where the rows go.
        seed: for the random numbers of encoders on ranks of their own in this step; None where they
            draw none, or from generators of their own.
    """

    replica: int
    inputs: Inputs | None
    placement: Placement
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Who encodes what of some jobs.

    Attributes:
        units: units of all jobs; ``batch`` is the number of the job.
        owners: for each unit, the number of the encoder's replica in the pool.
    """

    units: Sequence[Unit]
    owners: Sequence[int]

    def part(self, batch: int) -> Dealt:
        """What was dealt out of one job."""
        pairs = [*zip(self.units, self.owners, strict=True)]
        own = [pair for pair in pairs if pair[0].batch == batch]
        return Dealt(units=[unit for unit, _ in own], owners=[owner for _, owner in own])

    def of(self, batch: int, owner: int) -> list[Unit]:
        """What an owner encodes of a job."""
        pairs = zip(self.units, self.owners, strict=True)
        return [unit for unit, its in pairs if (unit.batch, its) == (batch, owner)]


def joined(parts: Sequence[Dealt]) -> Dealt:
    """Several parts as one."""
    return Dealt(
        units=[unit for part in parts for unit in part.units],
        owners=[owner for part in parts for owner in part.owners],
    )


def deal(
    modality: Modality, jobs: Sequence[Job], first: int = 0, loads: list[float] | None = None
) -> Dealt:
    """Deal jobs out, equally on every rank of the encoder.

    Args:
        modality: a modality with a module on this rank.
        jobs: jobs of all replicas of the pool, in one order everywhere.
        first: number of the first of these jobs.
        loads: cost that each owner has so far, to which these jobs are added.
    """
    assert modality.submodule is not None, "this rank encodes"
    units: list[Unit] = []
    for number, job in enumerate(jobs, first):
        if job.inputs is None or is_empty(job.inputs):
            check_count(modality.name, job.placement.rows, 0)
            continue
        units += units_of(modality.submodule, number, job.inputs, job.placement.rows)
    owners = deal_out([unit.cost for unit in units], len(modality.pool.owners), loads)
    return Dealt(units=units, owners=owners)


def encodings_of(
    jobs: Sequence[Job], dealt: Dealt, owners: int, first: int = 0
) -> tuple[list[Encoding], list[int]]:
    """Who encodes which rows, as ``RowRoutes`` takes it, and how many rows each owner encodes.

    Args:
        jobs: jobs of all replicas of the pool.
        dealt: who encodes what of them.
        owners: how many owners the pool has.
        first: number of the first of these jobs.
    """
    starts = [0] * owners
    nothing = torch.empty(0, dtype=torch.long)
    owner_parts: list[list[torch.Tensor]] = [[nothing] for _ in jobs]
    at_parts: list[list[torch.Tensor]] = [[nothing] for _ in jobs]
    for unit, owner in zip(dealt.units, dealt.owners, strict=True):
        owner_parts[unit.batch - first].append(torch.full((unit.rows,), owner))
        at = torch.arange(starts[owner], starts[owner] + unit.rows)
        at_parts[unit.batch - first].append(at)
        starts[owner] += unit.rows
    encodings = [
        Encoding(
            replica=job.replica,
            placement=job.placement,
            owner_N=torch.cat(owner_N),
            at_N=torch.cat(at_N),
        )
        for job, owner_N, at_N in zip(jobs, owner_parts, at_parts, strict=True)
    ]
    return encodings, starts


class InputsOfOthers:
    """Brings the inputs of a replica of the language model to ranks outside of it that encode them.

    All ranks of the pool that encode or speak make one for each step, with jobs of as many
    micro-batches, and call its methods in the order in which they stand here.

    Args:
        modality: the modality whose inputs they are.
        messages: between the ranks of the pool.
        replica: number of the language model's replica that this rank is in; None on ranks of
            encoders alone.
        count: micro-batches in the step.
    """

    def __init__(
        self, modality: Modality, messages: Messages, replica: int | None, count: int
    ) -> None:
        self._modality, self._messages = modality, messages
        self._replica, self._count = replica, count
        self._pool = modality.pool
        rank = dist.get_rank()
        self._speaks = replica is not None and self._pool.speaker_of(replica) == rank
        self._owner = self._pool.owner_of(rank)
        self._coming: dict[int, Message | None] = {}

    def jobs(self, own: Sequence[Job]) -> list[Job]:
        """The jobs of all replicas of the pool: micro-batch by micro-batch, replica by replica.

        A rank of the language model alone has none but its own. [] where a replica has none, which
        could not read its data.

        Args:
            own: jobs of this rank's replica; [] on ranks of encoders alone.
        """
        header = torch.empty(0, dtype=torch.uint8)
        if self._speaks:
            header = header_of([_plain(job) for job in own])
        to = self._encode_elsewhere() if self._speaks else []
        others = [r for r in self._pool.replicas if r != self._replica and self._owner >= 0]
        came = self._sized(header, to, [self._pool.speaker_of(replica) for replica in others])
        if self._owner < 0:
            return [*own]
        by_replica = {} if self._replica is None else {self._replica: own}
        for replica, content in zip(others, came, strict=True):
            by_replica[replica] = [_job(replica, one) for one in read_header(content)]
        if any(len(one) != self._count for one in by_replica.values()):
            return []
        return [by_replica[r][n] for n in range(self._count) for r in self._pool.replicas]

    def tell(self, dealt: Dealt | None) -> Dealt:
        """Tell ranks of the language model that have no encoder who encodes what.

        Args:
            dealt: None on these ranks.
        """
        source, rank = self._pool.stages[0][0][0], dist.get_rank()
        if dealt is None:
            (content,) = self._sized(torch.empty(0, dtype=torch.uint8), [], [source])
            table = content.view(torch.long).view(-1, 4).tolist()
            units = [
                Unit(batch=batch, item=None if item < 0 else item, rows=rows, cost=0.0)
                for batch, item, rows, _ in table
            ]
            return Dealt(units=units, owners=[owner for *_, owner in table])
        if rank == source:
            readers = [one for one in self._pool.reading if self._pool.owner_of(one) < 0]
            rows = [
                [unit.batch, -1 if unit.item is None else unit.item, unit.rows, owner]
                for unit, owner in zip(dealt.units, dealt.owners, strict=True)
            ]
            content = torch.tensor(rows, dtype=torch.long).view(-1).view(torch.uint8)
            self._sized(content, readers, [])
        return dealt

    def confirm(self, yes: bool) -> None:
        """Tell the encoders, where this rank speaks for the pool, whether their work is wanted."""
        if dist.get_rank() == self._pool.speaker_of(self._pool.replicas[0]):
            answer = torch.tensor([yes], device=self._modality.like_H.device)
            for rank in self._encode_elsewhere():
                self._messages.send(answer, rank)

    def is_confirmed(self) -> bool:
        """What ``confirm`` has said, on a rank that encodes."""
        like = self._modality.like_H.new_empty(0, dtype=torch.bool)
        answer = self._messages.receive(like, [1], self._pool.speaker_of(self._pool.replicas[0]))
        assert answer is not None, "an answer is a value"
        return bool(answer.wait().item())

    def send(self, number: int, inputs: Inputs | None, dealt: Dealt) -> None:
        """Send what others encode of a micro-batch, where this rank speaks for its replica."""
        if not self._speaks or self._replica is None:
            return
        batch, elsewhere = self.batch(number, self._replica), {*self._encode_elsewhere()}
        for owner, ranks in enumerate(self._pool.stages[0]):
            others = [rank for rank in ranks if rank in elsewhere]
            units = dealt.of(batch, owner) if others else []
            if units:
                content = large_bytes(part_of(units, inputs or {}))
                for rank in others:
                    self._messages.send(content.to(self._modality.like_H.device), rank, of=number)

    def expect(self, number: int, jobs: Sequence[Job], dealt: Dealt) -> None:
        """Ask for what this rank encodes of a micro-batch, before it needs it."""
        if self._owner < 0 or self._modality.stage != 0:
            return
        like = self._modality.like_H.new_empty(0, dtype=torch.uint8)
        for replica in self._pool.replicas:
            batch = self.batch(number, replica)
            if replica == self._replica or batch in self._coming:
                continue
            units = dealt.of(batch, self._owner)
            if units:
                size = size_of(part_of(units, jobs[batch].inputs or {}))
                speaker = self._pool.speaker_of(replica)
                self._coming[batch] = self._messages.receive(like, [size], speaker)

    def calls(self, batches: Sequence[int], jobs: Sequence[Job], dealt: Dealt) -> list[Call]:
        """The calls that encode this rank's share of some jobs, which was asked for.

        Args:
            batches: numbers of the jobs to encode, ascending.
            jobs: all jobs of the step.
            dealt: who encodes what of them.
        """
        parts: dict[int, Inputs] = {}
        units: list[Unit] = []
        for batch in batches:
            own = dealt.of(batch, self._owner)
            if not own:
                continue
            part: Any = part_of(own, jobs[batch].inputs or {})
            if batch in self._coming:
                coming = self._coming.pop(batch)
                nothing = self._modality.like_H.new_empty(0, dtype=torch.uint8)
                part = filled(part, nothing if coming is None else coming.wait())
            parts[batch] = part
            units += renumbered(own)
        most_rows = max((job.placement.rows for job in jobs), default=0)
        return calls_of(units, parts, most_rows=most_rows)

    def batches(self, number: int) -> range:
        """Numbers of the jobs of a micro-batch."""
        replicas = len(self._pool.replicas)
        return range(number * replicas, (number + 1) * replicas)

    def batch(self, number: int, replica: int) -> int:
        """Number of a replica's job of a micro-batch."""
        return self.batches(number)[self._pool.replicas.index(replica)]

    def _encode_elsewhere(self) -> list[int]:
        """Ranks that encode and are not in this rank's replica of the language model."""
        own = () if self._replica is None else self._pool.members[self._replica]
        return [rank for rank in self._pool.encoding if rank not in own]

    def _sized(
        self, content: torch.Tensor, to: Sequence[int], sources: Sequence[int]
    ) -> list[torch.Tensor]:
        """Send bytes to some ranks, and receive those of others on the host, of unknown sizes.

        All ranks that are named call it together.
        """
        like = self._modality.like_H.new_empty(0, dtype=torch.long)
        size = torch.tensor([content.numel()], device=like.device)
        with self._messages.together():
            for rank in to:
                self._messages.send(size, rank)
            coming = [self._messages.receive(like, [1], rank) for rank in sources]
        sizes = [int(one.wait().item()) for one in coming if one is not None]
        like, content = like.to(torch.uint8), content.to(like.device)
        with self._messages.together():
            for rank in to:
                self._messages.send(content, rank)
            coming = [
                self._messages.receive(like, [size], rank)
                for rank, size in zip(sources, sizes, strict=True)
            ]
        return [like.cpu() if one is None else one.wait().cpu() for one in coming]


def _plain(job: Job) -> dict[str, Any]:
    """A job as nested containers that ``header_of`` takes."""
    sources = [[*place, source_n] for place, source_n in job.placement.sources.items()]
    return {
        "inputs": job.inputs,
        "rows": job.placement.rows,
        "sources": sources,
        "seed": job.seed,
    }


def _job(replica: int, plain: Mapping[str, Any]) -> Job:
    sources = {(cp, tp): source_n for cp, tp, source_n in plain["sources"]}
    return Job(
        replica=replica,
        inputs=plain["inputs"],
        placement=Placement(rows=plain["rows"], sources=sources),
        seed=plain["seed"],
    )
