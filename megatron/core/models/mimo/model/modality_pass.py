"""One modality in a step that encodes first: its rows to the first stage, their gradients back.

Legend: N rows, W the width of a row with its levels beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.alignment import Encoded, EncodedRows
from megatron.core.models.mimo.comm.balance import deal_out
from megatron.core.models.mimo.comm.exchange import exchange_rows
from megatron.core.models.mimo.comm.pools import Pool
from megatron.core.models.mimo.comm.row_routes import Encoding, Placement, RowRoutes
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.checks import check_count
from megatron.core.models.mimo.model.encode import is_empty
from megatron.core.models.mimo.model.idle import idle_rows
from megatron.core.models.mimo.model.media_units import Call, Inputs, Unit, calls_of, units_of
from megatron.core.models.mimo.model.ranges import named_range
from megatron.core.models.mimo.model.wide_rows import apart, side_by_side
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one replica of the language model has to encode in one micro-batch.

    Attributes:
        replica: its data-parallel index.
        inputs: of all encoders; None without any.
        placement: where the rows go.
        seed: of what encoders on ranks of their own draw in this step; None where they draw
            nothing, or ask generators of their own.
    """

    replica: int
    inputs: Inputs | None
    placement: Placement
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Modality:
    """A modality of the model, and the ranks that share its work.

    Attributes:
        name: its.
        submodule: this rank's, maybe wrapped; None where it is on other ranks.
        pool: this rank's.
        group: of the pool; None where it is this rank alone.
        feed: of the pool's ranks in ``feed``, where the modality is on ranks of its own.
        like_H: a vector like one row.
        recompute: forget activations after forward, and encode once more in backward.
    """

    name: str
    submodule: nn.Module | None
    pool: Pool
    group: dist.ProcessGroup | None
    feed: dist.ProcessGroup | None = None
    like_H: torch.Tensor
    recompute: bool

    @property
    def levels(self) -> int:
        """Further levels of every row; 0 where the modality is on other ranks."""
        if self.submodule is None:
            return 0
        levels: int = getattr(unwrap_model(self.submodule), "num_levels", 0)
        return levels

    @property
    def trains(self) -> bool:
        """True where a gradient is wanted of it now."""
        if self.submodule is None:
            return False
        wanted = any(parameter.requires_grad for parameter in self.submodule.parameters())
        return wanted and torch.is_grad_enabled()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Agreed:
    """What all ranks of a pool know of a step.

    Attributes:
        encodings: who encodes what.
        trains: a gradient is wanted of the modality.
        levels: of its rows.
        cost: of all that is encoded.
        seed: of what the encoders draw; None where they draw nothing.
    """

    encodings: list[Encoding]
    trains: bool
    levels: int
    cost: float
    seed: int | None


class ModalityPass:
    """The rows of one step.

    All ranks of the pool make one, with the same jobs of the pool's replicas, in one order. Where
    the modality is on ranks of its own, these have all the jobs and tell the others what they
    encode, in one broadcast; a rank of the language model has the jobs of its replica.

    Args:
        modality: whose rows.
        jobs: of all replicas in the pool.
        own: number of this rank's replica; None on ranks of encoders alone.
        seed: of what the encoders draw; None where they draw nothing.

    Attributes:
        rows: for each micro-batch of this rank's replica, the rows that this rank places, with
            gradient; [] off the first stage.
        cost: of what this rank encodes, and of what the pool does.
    """

    def __init__(
        self, modality: Modality, jobs: Sequence[Job], own: int | None, seed: int | None
    ) -> None:
        self._modality = modality
        self._calls: list[Call] = []
        agreed, encoded, mine = None, 0, 0.0
        if modality.submodule is not None:
            self._calls, encodings, encoded, (mine, cost) = _deal_out(modality, jobs)
            agreed = _Agreed(
                encodings=encodings,
                trains=modality.trains,
                levels=modality.levels,
                cost=cost,
                seed=jobs[0].seed if modality.pool.is_apart else seed,
            )
        agreed = _told(modality, agreed)
        self._trains, self._levels, self._seed = agreed.trains, agreed.levels, agreed.seed
        self.cost = mine, agreed.cost
        self._states: list[Mapping[str, Any]] = []
        self._encoded: list[torch.Tensor] = []
        routes = RowRoutes(modality.pool, dist.get_rank(), agreed.encodings, encoded)
        self._back = routes.backward() if self._trains else None
        wide_NW = exchange_rows(self._forward(), routes.forward(), modality.group)
        self._leaves = self._cut(wide_NW, [job for job in jobs if job.replica == own], own)
        self.rows: list[Encoded] = [apart(leaf, self._levels) for leaf in self._leaves]

    def backward(self) -> None:
        """Bring the gradients of the rows back to who encoded them, and run the encoders' backward.

        All ranks of the pool take part in one exchange; nothing where the modality is frozen.
        """
        if self._back is None:
            return
        grads = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves
        ]
        modality = self._modality
        given_NW = torch.cat(grads) if grads else self._nothing()
        self._leaves, self.rows = [], []
        grad_NW = exchange_rows(given_NW.contiguous(), self._back, modality.group)
        if modality.submodule is None:
            return
        parts = grad_NW.split_with_sizes([call.rows for call in self._calls])
        self._backward_calls(parts if self._calls else [grad_NW[:0]])

    def _forward(self) -> torch.Tensor:
        """Rows [n, W] of all that this rank encodes; graphs are kept unless they are recomputed."""
        if self._modality.submodule is None:
            return self._nothing()
        keeps = self._trains and not self._modality.recompute
        outputs = []
        with nullcontext() if keeps else torch.no_grad():
            for number in range(max(len(self._calls), 1)):
                self._states.append(get_cuda_rng_tracker().get_states())
                wide_NW = self._encode(number)
                outputs.append(wide_NW.detach())
                if keeps:
                    self._encoded.append(wide_NW)
        return torch.cat(outputs).contiguous()

    def _encode(self, number: int) -> torch.Tensor:
        """One call; where there is none, what keeps this rank in step with those that have some."""
        modality, submodule = self._modality, self._modality.submodule
        assert submodule is not None, "this rank encodes"
        drawing = _drawing_from(self._seed, number, modality)
        with named_range(f"encode {modality.name}"), drawing:
            if not self._calls:
                encoded = idle_rows(submodule, modality.like_H.numel())
            else:
                encoded = submodule(encoder_inputs=self._calls[number].inputs)
        if self._calls:
            self._check(self._calls[number], encoded)
        return side_by_side(encoded, modality.levels, modality.like_H)

    def _check(self, call: Call, encoded: Encoded | None) -> None:
        got = 0 if encoded is None else EncodedRows.of(encoded).num_rows
        name, width = self._modality.name, self._modality.like_H.numel()
        if got != call.rows:
            raise InputError(
                f"{name}: the encoders gave {got} rows for inputs of which {call.rows} were "
                "expected, by the placeholders or by rows_per_item; the batch lacks inputs or "
                "placeholders, or rows_per_item is wrong"
            )
        if encoded is not None and EncodedRows.of(encoded).rows_NH.size(1) != width:
            raise InputError(
                f"{name}: the rows are {EncodedRows.of(encoded).rows_NH.size(1)} wide; the "
                f"language model's hidden_size is {width}: let the projection end in that width"
            )

    def _cut(
        self, wide_NW: torch.Tensor, jobs: Sequence[Job], own: int | None
    ) -> list[torch.Tensor]:
        """The rows of each micro-batch, as leaves."""
        if own is None:
            return []
        places = self._modality.pool.readers[own]
        here = next((at for at, rank in places.items() if rank == dist.get_rank()), None)
        if here is None:
            return []
        sizes = []
        for job in jobs:
            sources = job.placement.sources
            sizes.append(sources[here if here in sources else (here[0], 0)].numel())
        leaves = [part.detach() for part in wide_NW.split_with_sizes(sizes)]
        return [leaf.requires_grad_(self._trains) for leaf in leaves]

    def _backward_calls(self, grads: Sequence[torch.Tensor]) -> None:
        """Backward of every call; only the last one may start reductions."""
        for number, grad_NW in enumerate(grads):
            with _held_back(self._modality.submodule, number < len(grads) - 1):
                if self._modality.recompute:
                    wide_NW = self._encode_again(number)
                else:
                    wide_NW, self._encoded[number] = self._encoded[number], grad_NW
                if wide_NW.requires_grad:
                    with named_range("backward"):
                        torch.autograd.backward(wide_NW, grad_NW)

    def _encode_again(self, number: int) -> torch.Tensor:
        tracker = get_cuda_rng_tracker()
        now = tracker.get_states()
        tracker.set_states(dict(self._states[number]))
        try:
            with torch.enable_grad():
                return self._encode(number)
        finally:
            tracker.set_states(now)

    def _nothing(self) -> torch.Tensor:
        return side_by_side(None, self._levels, self._modality.like_H)


def _told(modality: Modality, agreed: _Agreed | None) -> _Agreed:
    """What the encoder's first rank knows, on ranks of the language model too."""
    if modality.pool.is_apart:
        told = [agreed]
        source = modality.pool.owners[0][0]
        dist.broadcast_object_list(told, src=source, group=modality.group)
        (agreed,) = told
    assert agreed is not None, "a rank that encodes knows, others are told"
    return agreed


def _deal_out(
    modality: Modality, jobs: Sequence[Job]
) -> tuple[list[Call], list[Encoding], int, tuple[float, float]]:
    """This rank's calls, who encodes what, the rows of its encoder replica, and what that costs."""
    assert modality.submodule is not None, "this rank encodes"
    units: list[Unit] = []
    inputs: dict[int, Inputs] = {}
    for number, job in enumerate(jobs):
        if job.inputs is None or is_empty(job.inputs):
            check_count(modality.name, job.placement.rows, 0)
            continue
        inputs[number] = job.inputs
        units += units_of(modality.submodule, number, job.inputs, job.placement.rows)
    owners = deal_out([unit.cost for unit in units], len(modality.pool.owners))
    starts = [0] * len(modality.pool.owners)
    owner_parts: list[list[torch.Tensor]] = [[] for _ in jobs]
    at_parts: list[list[torch.Tensor]] = [[] for _ in jobs]
    for unit, owner in zip(units, owners, strict=True):
        owner_parts[unit.batch].append(torch.full((unit.rows,), owner))
        at_parts[unit.batch].append(torch.arange(starts[owner], starts[owner] + unit.rows))
        starts[owner] += unit.rows
    nothing = torch.empty(0, dtype=torch.long)
    encodings = [
        Encoding(
            replica=job.replica,
            placement=job.placement,
            owner_N=torch.cat([nothing, *owner_parts[number]]),
            at_N=torch.cat([nothing, *at_parts[number]]),
        )
        for number, job in enumerate(jobs)
    ]
    here = modality.pool.owner_of(dist.get_rank())
    mine = [unit for unit, owner in zip(units, owners, strict=True) if owner == here]
    most_rows = max((job.placement.rows for job in jobs), default=0)
    cost = sum(unit.cost for unit in mine), sum(unit.cost for unit in units)
    return calls_of(mine, inputs, most_rows=most_rows), encodings, starts[here], cost


@contextmanager
def _held_back(submodule: nn.Module | None, wanted: bool) -> Iterator[None]:
    """No reductions of gradients begin within this context, where that is wanted."""
    if wanted and isinstance(submodule, DistributedDataParallel):
        with submodule.no_sync():
            yield
    else:
        yield


@contextmanager
def _drawing_from(seed: int | None, call: int, modality: Modality) -> Iterator[None]:
    """Encoders draw from a generator of their own: ranks encode different items.

    The generators that are equal on tensor-parallel ranks have to stay so.
    """
    if seed is None:
        yield
        return
    device = modality.like_H.device
    devices = [] if device.type == "cpu" else [device]
    owner = modality.pool.owner_of(dist.get_rank())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + 1009 * owner + call)
        yield


def gather_jobs(modality: Modality, own: int | None, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of all replicas of a pool: those of one replica after those of another.

    Where the pool has one replica, and the encoders are on its ranks, nothing is sent; else its
    ranks take part in one all-gather of the inputs, through the host. Where the encoders are on
    ranks of their own, these and one rank of each replica do; others keep their replica's.

    Args:
        modality: whose.
        own: number of this rank's replica; None on ranks of encoders alone.
        jobs: its, equal on all its ranks.
    """
    pool, rank = modality.pool, dist.get_rank()
    ranks, group = (pool.feed, modality.feed) if pool.is_apart else (pool.ranks, modality.group)
    if (len(pool.replicas) == 1 and not pool.is_apart) or rank not in ranks:
        return [*jobs]
    told = None
    if own is not None and rank == pool.speaker_of(own):
        told = [replace(job, inputs=_map(job.inputs, lambda one: one.cpu())) for job in jobs]
    heard: list[list[Job] | None] = [None] * len(ranks)
    dist.all_gather_object(heard, told, group=group)
    found: list[Job] = []
    move = partial(torch.Tensor.to, device=modality.like_H.device)
    for replica in pool.replicas:
        if replica == own:
            found += jobs
            continue
        theirs = heard[ranks.index(pool.speaker_of(replica))]
        assert theirs is not None, "the speaker of every replica tells"
        found += [replace(job, inputs=_map(job.inputs, move)) for job in theirs]
    return found


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A nest of containers with every tensor changed."""
    if torch.is_tensor(value):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(one, change) for one in value)
    return value
