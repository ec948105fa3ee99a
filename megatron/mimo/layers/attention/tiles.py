"""Attention cut into tiles: runs of queries against runs of keys that one kernel call can take.

A rank holds runs of documents. Without context parallelism it holds every document whole; with it,
of each document (a dense sequence is one) chunk r and chunk 2*cp-1-r of 2*cp equal chunks, next to
each other. The keys travel round a ring: at step i a rank works on those of rank r - i. Because of
that layout causal attention needs no mask: a rank's own keys are plainly causal, of an earlier
rank's keys every query sees the first chunk, and of a later rank's keys only the second chunk of
queries sees anything, and that all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.layers.attention.visibility import Relation, Visibility

__all__ = ["Document", "Plan", "Tile", "plan_tiles"]

_BLOCK = 256
"""Queries per tile where a tile needs a mask: bounds the mask to [B, 256, keys]."""


@dataclass(frozen=True)
class Document:
    """Tokens that see each other: ``length`` of them in a place for ``padded``, at its start."""

    length: int
    padded: int


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel call: rows of the local queries against rows of the keys of one rank.

    Attributes:
        q, k: rows [start, stop) of the local tensors.
        q_position, k_position: position in the document of the first of them.
        causal: query i of the tile sees keys 0..i of the tile; as many keys as queries.
        masked: the visibility rule has to be asked for every pair.
        first: no tile before it has the same queries.
    """

    q: slice
    k: slice
    q_position: int = 0
    k_position: int = 0
    causal: bool = False
    masked: bool = False
    first: bool = True


@dataclass(frozen=True)
class Plan:
    """The tiles of each step of the ring, for one rank.

    Attributes:
        steps: as many as ranks.
        single: every query is in one tile at most, so that nothing has to be merged.
    """

    steps: tuple[tuple[Tile, ...], ...]
    single: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [start, start + length) of a rank, consecutive tokens of a document."""

    start: int
    length: int
    position: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def positions(self) -> range:
        return range(self.position, self.position + self.length)

    def cut(self, positions: range) -> _Run:
        start = self.start + positions.start - self.position
        return _Run(start, len(positions), positions.start)


@functools.lru_cache(maxsize=64)
def plan_tiles(
    queries: tuple[Document, ...],
    keys: tuple[Document, ...],
    visibility: Visibility,
    *,
    rank: int = 0,
    size: int = 1,
) -> Plan:
    """The tiles that ``rank`` of ``size`` context-parallel ranks works on.

    Args:
        queries: the documents of the whole row, in order.
        keys: theirs, document by document; under context parallelism the same.
        visibility: the rule inside a document.
        rank: in the context-parallel group.
        size: of that group.

    Raises:
        InputError: a document's padded length is not divisible by 2*cp.
    """
    held = _holdings(queries, rank, size)
    steps = []
    started: set[tuple[int, int]] = set()
    for step in range(size):
        source = (rank - step) % size
        tiles: list[Tile] = []
        for q_runs, k_runs in zip(held, _holdings(keys, source, size), strict=True):
            if visibility.is_plain:
                causal = visibility.ahead == 0
                tiles.extend(_plain_tiles(q_runs, k_runs, causal=causal, order=rank - source))
            else:
                tiles.extend(_ruled_tiles(q_runs, k_runs, visibility, started))
        steps.append(tuple(tiles))
    single = all(tile.first for tiles in steps for tile in tiles)
    return Plan(steps=tuple(steps), single=single)


def _holdings(documents: tuple[Document, ...], rank: int, size: int) -> list[tuple[_Run, ...]]:
    """What a rank holds of each document: one run, or its two chunks."""
    runs: list[tuple[_Run, ...]] = []
    offset = 0
    for index, document in enumerate(documents):
        if size == 1:
            runs.append((_Run(offset, document.length, 0),))
            offset += document.padded
            continue
        chunk, rest = divmod(document.padded, 2 * size)
        if rest:
            raise InputError(
                f"document {index} is {document.padded} tokens long with padding, not divisible "
                f"by 2*cp = {2 * size}; pad it to {(chunk + 1) * 2 * size}"
            )
        positions = (rank * chunk, (2 * size - 1 - rank) * chunk)
        starts = (offset, offset + chunk)
        runs.append(
            tuple(
                _Run(start, min(max(document.length - position, 0), chunk), position)
                for start, position in zip(starts, positions, strict=True)
            )
        )
        offset += 2 * chunk
    return runs


def _plain_tiles(
    q_runs: tuple[_Run, ...], k_runs: tuple[_Run, ...], *, causal: bool, order: int
) -> Iterator[Tile]:
    """One tile per document and step; ``order`` is this rank minus the rank of the keys.

    Where the second chunk holds tokens the first is full, so that both make one run of rows.
    """
    q_start, q_stop = q_runs[0].start, q_runs[0].start + sum(run.length for run in q_runs)
    k_start, k_stop = k_runs[0].start, k_runs[0].start + sum(run.length for run in k_runs)
    if causal and order > 0:
        k_stop = k_runs[0].rows.stop
    if causal and order < 0:
        q_start, q_stop = q_runs[1].rows.start, q_runs[1].rows.stop
    if q_start < q_stop and k_start < k_stop:
        yield Tile(
            q=slice(q_start, q_stop),
            k=slice(k_start, k_stop),
            causal=causal and order == 0,
            first=order == 0,
        )


def _ruled_tiles(
    q_runs: tuple[_Run, ...],
    k_runs: tuple[_Run, ...],
    visibility: Visibility,
    started: set[tuple[int, int]],
) -> Iterator[Tile]:
    """Blocks of queries against what they can see of each run of keys."""
    for q_run in q_runs:
        for start in range(0, q_run.length, _BLOCK):
            positions = q_run.positions[start : start + _BLOCK]
            block = q_run.cut(positions)
            for k_run in k_runs:
                for keys in _split(visibility, positions, k_run.positions):
                    relation = visibility.relation(positions, keys)
                    if relation is Relation.NOTHING:
                        continue
                    seen = k_run.cut(keys)
                    rows = (block.rows.start, block.rows.stop)
                    yield Tile(
                        q=block.rows,
                        k=seen.rows,
                        q_position=block.position,
                        k_position=seen.position,
                        masked=relation is Relation.PART,
                        first=rows not in started,
                    )
                    started.add(rows)


def _split(visibility: Visibility, queries: range, keys: range) -> list[range]:
    """The reachable keys; where all before the queries are seen, those apart from the rest."""
    keys = visibility.visible_keys(queries, keys)
    if visibility.behind is not None or visibility.ahead != 0:
        return [keys] if keys else []
    middle = min(max(queries.start, keys.start), keys.stop)
    parts = [range(keys.start, middle), range(middle, keys.stop)]
    return [part for part in parts if part]
