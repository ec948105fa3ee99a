"""Routes of rows from the ranks that encode them to those that place them, and of gradients back.

A row takes one position of a sequence, so one context-parallel rank places it; under sequence
parallelism one rank alone. Without, the tensor-parallel ranks place copies, and each of them has
the whole gradient: one of them gives it back.

Legend: N rows of one micro-batch, n some of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron.core.models.mimo.comm.exchange import Routes
from megatron.core.models.mimo.comm.pools import Place, Pool


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Where the rows of one modality go in one micro-batch.

    Attributes:
        rows: N.
        sources: place on the first stage -> long [n], the rows that are placed there, in order.
            Of tensor-parallel ranks that place the same rows, index 0 stands for all.
    """

    rows: int
    sources: Mapping[Place, torch.Tensor]

    def rows_at(self, place: Place) -> int:
        """How many rows are placed there."""
        return self.sources[place if place in self.sources else (place[0], 0)].numel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoding:
    """Who encodes the rows of one micro-batch.

    Attributes:
        replica: number of the language model's replica whose micro-batch it is.
        placement: where its rows go.
        owner_N: long [N], the encoder's replica (its number in the pool).
        at_N: long [N], number of the row among all that its owner encodes.
    """

    replica: int
    placement: Placement
    owner_N: torch.Tensor
    at_N: torch.Tensor


class RowRoutes:
    """The routes of one step, of one rank.

    Args:
        pool: the ranks among which rows travel.
        rank: this rank.
        encodings: one for every micro-batch of every replica in the pool, in one order everywhere.
        encoded: how many rows this rank's encoder replica encodes.
    """

    def __init__(self, pool: Pool, rank: int, encodings: Sequence[Encoding], encoded: int) -> None:
        self._pool, self._rank, self._encoded = pool, rank, encoded
        self._owner = pool.giver_of(rank)
        self._reads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # owner_n, at_n
        self._copies: dict[int, tuple[int, ...]] = {}  # ranks that read the same rows
        for replica, places in pool.readers.items():
            own = [one for one in encodings if one.replica == replica]
            for place, reader in places.items():
                key = _key(place, own)
                sources = [one.placement.sources[key] for one in own]
                pairs = list(zip(own, sources, strict=True))
                self._reads[reader] = (
                    _joined([one.owner_N[source_n] for one, source_n in pairs]),
                    _joined([one.at_N[source_n] for one, source_n in pairs]),
                )
                self._copies[reader] = tuple(
                    other for at, other in places.items() if _key(at, own) == key
                )

    def forward(self) -> Routes:
        """Routes of rows, from owners to readers."""
        give, take, size = [], [], 0
        for other in self._pool.ranks:
            index_n = _NOTHING
            if other in self._reads and self._gives(other):
                owner_n, at_n = self._reads[other]
                index_n = at_n[owner_n == self._owner]
            give.append(index_n)
            take.append(self._taken_from(other))
        if self._rank in self._reads:
            size = self._reads[self._rank][0].numel()
        return Routes(give=tuple(give), take=tuple(take), size=size)

    def backward(self) -> Routes:
        """Routes of gradients, from readers back: each once to every rank of the row's owner."""
        give, take = [], []
        for other in self._pool.ranks:
            give.append(self._given_back_to(other))
            index_n = _NOTHING
            owns = self._owner >= 0
            if owns and other in self._reads and self._giver_back(self._rank, other) == other:
                owner_n, at_n = self._reads[other]
                index_n = at_n[owner_n == self._owner]
            take.append(index_n)
        return Routes(give=tuple(give), take=tuple(take), size=self._encoded)

    def _taken_from(self, other: int) -> torch.Tensor:
        """Where this rank, which places rows, puts those that it takes from another."""
        if self._rank not in self._reads:
            return _NOTHING
        owner = self._pool.giver_of(other)
        if owner < 0 or self._giver(owner, self._rank) != other:
            return _NOTHING
        return (self._reads[self._rank][0] == owner).nonzero().squeeze(1)

    def _given_back_to(self, other: int) -> torch.Tensor:
        """Rows, of those that this rank has placed, whose gradients it sends to another."""
        if self._rank not in self._reads or self._giver_back(other, self._rank) != self._rank:
            return _NOTHING
        owner = self._pool.giver_of(other)
        if owner < 0:
            return _NOTHING
        return (self._reads[self._rank][0] == owner).nonzero().squeeze(1)

    def _gives(self, reader: int) -> bool:
        """This rank gives a reader what its owner has encoded for it."""
        return self._owner >= 0 and self._giver(self._owner, reader) == self._rank

    def _giver(self, owner: int, reader: int) -> int:
        """Which rank of an owner gives a reader its rows: the reader itself if it can."""
        return _choose(self._pool.owners[owner], reader, self._pool)

    def _giver_back(self, taker: int, reader: int) -> int:
        """Which of the ranks that read what ``reader`` reads gives ``taker`` the gradient."""
        return _choose(self._copies[reader], taker, self._pool)


_NOTHING = torch.empty(0, dtype=torch.long)


def _choose(candidates: Sequence[int], rank: int, pool: Pool) -> int:
    if rank in candidates:
        return rank
    return candidates[pool.ranks.index(rank) % len(candidates)]


def _key(place: Place, encodings: Sequence[Encoding]) -> Place:
    """The place under which the rows that a rank places are listed."""
    if all(place in one.placement.sources for one in encodings):
        return place
    return place[0], 0


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_NOTHING, *parts])
