"""Ranks that share their encoder inputs, so that any of them may encode any item.

A replica of the language model is all its ranks of one data-parallel index: they have the same
micro-batches. A replica of an encoder is one tensor-parallel group of it. Where an encoder's
replica reaches over several replicas of the language model, these are in one pool. Encoders on
ranks of their own are dealt out to replicas of the language model in equal shares, as small as
their numbers allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from megatron.core.models.mimo.config.grids import Geometry, connected

Place = tuple[int, int]  # context-parallel and tensor-parallel index


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Ranks that share their encoder inputs.

    Attributes:
        ranks: ascending.
        replicas: data-parallel indices of the language model's replicas.
        owners: of each replica of the encoder, its ranks by tensor-parallel index.
        readers: replica of the language model -> place on its first stage -> rank.
    """

    ranks: tuple[int, ...]
    replicas: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]
    readers: Mapping[int, Mapping[Place, int]]

    def owner_of(self, rank: int) -> int:
        """The encoder's replica that a rank is in; -1 for a rank of the language model alone."""
        return next((number for number, ranks in enumerate(self.owners) if rank in ranks), -1)

    @property
    def is_apart(self) -> bool:
        """The encoder is on ranks of its own, and knows the inputs from the speakers alone."""
        return any(self.owner_of(rank) < 0 for rank in self.ranks)

    @property
    def feed(self) -> tuple[int, ...]:
        """The ranks that tell and learn what is to be encoded: speakers and encoder ranks."""
        speakers = (self.speaker_of(replica) for replica in self.replicas)
        return tuple(sorted({*speakers, *(rank for ranks in self.owners for rank in ranks)}))

    def speaker_of(self, replica: int) -> int:
        """The rank that tells the pool what a replica of the language model has to encode."""
        return min(self.readers[replica].values())


def pools_of(encoder: Geometry, language: Geometry) -> list[Pool]:
    """The pools of one modality; every rank of the encoder and of the language model is in one.

    Args:
        encoder: with axes tp and dp, over the language model's ranks or over none of them.
        language: any axes.
    """
    if not set(encoder.ranks) & set(language.ranks):
        return _pools_apart(encoder, language)
    links: list[tuple[int, int]] = []
    for geometry in (encoder, language):
        for index in range(geometry.sizes["dp"]):
            first, *others = geometry.where(dp=index)
            links += [(first, other) for other in others]
    pools = []
    for ranks in connected(language.ranks, links):
        replicas = sorted({language.positions[rank].dp for rank in ranks})
        owners = sorted({encoder.positions[rank].dp for rank in ranks})
        pools.append(
            Pool(
                ranks=tuple(ranks),
                replicas=tuple(replicas),
                owners=tuple(_by_tensor_index(encoder, owner) for owner in owners),
                readers={replica: _first_stage(language, replica) for replica in replicas},
            )
        )
    return pools


def _pools_apart(encoder: Geometry, language: Geometry) -> list[Pool]:
    number = gcd(encoder.sizes["dp"], language.sizes["dp"])
    owners = encoder.sizes["dp"] // number
    served = language.sizes["dp"] // number
    pools = []
    for at in range(number):
        own = tuple(_by_tensor_index(encoder, at * owners + n) for n in range(owners))
        replicas = tuple(range(at * served, (at + 1) * served))
        ranks = {rank for one in own for rank in one}
        ranks |= {rank for replica in replicas for rank in language.where(dp=replica)}
        pools.append(
            Pool(
                ranks=tuple(sorted(ranks)),
                replicas=replicas,
                owners=own,
                readers={replica: _first_stage(language, replica) for replica in replicas},
            )
        )
    return pools


def _by_tensor_index(encoder: Geometry, owner: int) -> tuple[int, ...]:
    return tuple(sorted(encoder.where(dp=owner), key=lambda rank: encoder.positions[rank].tp))


def _first_stage(language: Geometry, replica: int) -> dict[Place, int]:
    found = {}
    for rank in language.where(dp=replica, pp=0):
        position = language.positions[rank]
        found[position.cp, position.tp] = rank
    return found
