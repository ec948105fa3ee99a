"""Ranks that share their encoder inputs, so that any of them may encode any item.

A replica of the language model is all its ranks of one data-parallel index: they have the same
micro-batches. A replica of an encoder is one tensor-parallel group of it. Where an encoder's
replica reaches over several replicas of the language model, these are in one pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        """The encoder's replica that a rank is in."""
        return next(number for number, ranks in enumerate(self.owners) if rank in ranks)

    def speaker_of(self, replica: int) -> int:
        """The rank that tells the pool what a replica of the language model has to encode."""
        return min(self.readers[replica].values())


def pools_of(encoder: Geometry, language: Geometry) -> list[Pool]:
    """The pools of one modality; every rank is in one.

    Args:
        encoder: over the language model's ranks, with axes tp and dp.
        language: any axes.
    """
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


def _by_tensor_index(encoder: Geometry, owner: int) -> tuple[int, ...]:
    return tuple(sorted(encoder.where(dp=owner), key=lambda rank: encoder.positions[rank].tp))


def _first_stage(language: Geometry, replica: int) -> dict[Place, int]:
    found = {}
    for rank in language.where(dp=replica, pp=0):
        position = language.positions[rank]
        found[position.cp, position.tp] = rank
    return found
