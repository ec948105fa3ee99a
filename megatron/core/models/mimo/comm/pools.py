"""Ranks that share their encoder inputs, so that any of them may encode any item.

A replica of the language model is all its ranks of one data-parallel index: they have the same
micro-batches. A replica of an encoder is one tensor-parallel group, or one for each pipeline stage
of the encoder. Where it reaches over several replicas of the language model, these are in one pool.
Where encoders have ranks of their own, every pool has as many replicas of either kind as the
others, and there are as many pools as that allows.
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
        owners: of each replica of the encoder, its ranks by tensor-parallel index; of several
            stages, those of the last one.
        readers: replica of the language model -> place on its first stage -> rank.
        members: replica of the language model -> its ranks.
        earlier: for each pipeline stage of the encoder before the last one, its ranks as ``owners``
            has those of the last.
    """

    ranks: tuple[int, ...]
    replicas: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]
    readers: Mapping[int, Mapping[Place, int]]
    members: Mapping[int, tuple[int, ...]]
    earlier: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def stages(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Ranks of each stage of the encoder, by its replica and tensor-parallel index."""
        return (*self.earlier, self.owners)

    def owner_of(self, rank: int) -> int:
        """The encoder's replica that a rank is in; -1 for a rank of the language model alone."""
        found = (n for stage in self.stages for n, ranks in enumerate(stage) if rank in ranks)
        return next(found, -1)

    def giver_of(self, rank: int) -> int:
        """The encoder's replica with a rank in its last stage, which gives rows; -1 for others."""
        return next((number for number, ranks in enumerate(self.owners) if rank in ranks), -1)

    @property
    def encoding(self) -> tuple[int, ...]:
        """The ranks of the encoder, ascending."""
        return tuple(sorted(rank for stage in self.stages for ranks in stage for rank in ranks))

    @property
    def meeting(self) -> tuple[int, ...]:
        """The ranks among which inputs, rows and gradients travel, ascending."""
        return tuple(sorted({*self.encoding, *self.reading}))

    @property
    def reading(self) -> tuple[int, ...]:
        """The ranks that place rows, ascending."""
        return tuple(sorted(rank for places in self.readers.values() for rank in places.values()))

    def speaker_of(self, replica: int) -> int:
        """The rank that tells the pool what a replica of the language model has to encode."""
        return min(self.readers[replica].values())


def pools_of(encoder: Geometry, language: Geometry) -> list[Pool]:
    """The pools of one modality; every rank of the encoder and of the language model is in one.

    Args:
        encoder: on the language model's ranks, with the axes tp and dp; or on ranks of its own,
            with pp besides.
        language: any axes.
    """
    if not set(encoder.ranks) & set(language.ranks):
        return _disjoint_pools(encoder, language)
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
                members={replica: language.where(dp=replica) for replica in replicas},
            )
        )
    return pools


def _disjoint_pools(encoder: Geometry, language: Geometry) -> list[Pool]:
    number = gcd(encoder.sizes["dp"], language.sizes["dp"])
    owners = encoder.sizes["dp"] // number
    served = language.sizes["dp"] // number
    pools = []
    for at in range(number):
        *earlier, own = (
            tuple(_by_tensor_index(encoder, at * owners + n, stage) for n in range(owners))
            for stage in range(encoder.sizes["pp"])
        )
        replicas = tuple(range(at * served, (at + 1) * served))
        ranks = {rank for stage in (*earlier, own) for one in stage for rank in one}
        ranks |= {rank for replica in replicas for rank in language.where(dp=replica)}
        pools.append(
            Pool(
                ranks=tuple(sorted(ranks)),
                replicas=replicas,
                owners=own,
                readers={replica: _first_stage(language, replica) for replica in replicas},
                members={replica: language.where(dp=replica) for replica in replicas},
                earlier=tuple(earlier),
            )
        )
    return pools


def _by_tensor_index(encoder: Geometry, owner: int, stage: int = 0) -> tuple[int, ...]:
    ranks = encoder.where(dp=owner, pp=stage)
    return tuple(sorted(ranks, key=lambda rank: encoder.positions[rank].tp))


def _first_stage(language: Geometry, replica: int) -> dict[Place, int]:
    found = {}
    for rank in language.where(dp=replica, pp=0):
        position = language.positions[rank]
        found[position.cp, position.tp] = rank
    return found
