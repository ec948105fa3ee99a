"""Who encodes what, in which calls, and where rows go: without ranks."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.comm.balance import deal_out
from megatron.core.models.mimo.comm.pools import Pool, pools_of
from megatron.core.models.mimo.comm.row_routes import Encoding, Placement, RowRoutes
from megatron.core.models.mimo.config.grids import Geometry, Position
from megatron.core.models.mimo.model.encode_first.media_units import Unit, calls_of, units_of


def geometry(**sizes: int) -> Geometry:
    """Ranks dealt out as Megatron does: tp first, pp last."""
    axes = ("tp", "cp", "dp", "pp")
    full = {axis: sizes.get(axis, 1) for axis in axes}
    indices = product(*(range(full[axis]) for axis in reversed(axes)))
    positions = [Position(**dict(zip(reversed(axes), index, strict=True))) for index in indices]
    return Geometry(sizes=full, positions=dict(enumerate(positions)))


def test_the_dearest_items_go_first_to_who_has_least() -> None:
    assert deal_out([], 3) == []
    assert deal_out([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert deal_out([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("owners", [2, 4, 8])
def test_sizes_as_photographs_have_them_are_balanced_to_a_tenth(owners: int) -> None:
    """Patches of 16 images for each rank, of areas that spread over a factor of thirty."""
    chance = random.Random(owners)
    costs = [float(int(256 * chance.lognormvariate(0.0, 0.8)) + 1) for _ in range(16 * owners)]
    loads = [0.0] * owners
    for cost, owner in zip(costs, deal_out(costs, owners), strict=True):
        loads[owner] += cost
    assert max(loads) <= 1.1 * sum(loads) / owners


def test_a_pool_is_a_replica_of_the_language_model() -> None:
    language = geometry(tp=2, dp=2, pp=2)
    first, second = pools_of(geometry(dp=8), language)
    assert (first.ranks, first.replicas) == ((0, 1, 4, 5), (0,))
    assert first.owners == ((0,), (1,), (4,), (5,))
    assert first.readers == {0: {(0, 0): 0, (0, 1): 1}}
    assert second.ranks == (2, 3, 6, 7)


def test_an_encoder_that_reaches_over_replicas_joins_their_pools() -> None:
    (pool,) = pools_of(geometry(tp=4), geometry(tp=2, dp=2))
    assert (pool.ranks, pool.replicas, pool.owners) == ((0, 1, 2, 3), (0, 1), ((0, 1, 2, 3),))


def test_each_stage_of_an_encoder_apart_has_the_ranks_of_every_owner() -> None:
    encoder = geometry(dp=2, pp=2)
    shifted = {rank + 4: place for rank, place in geometry(dp=2).positions.items()}
    (one, other) = pools_of(encoder, Geometry(sizes=geometry(dp=2).sizes, positions=shifted))
    assert one.stages == (((0,),), ((2,),))
    assert other.stages == (((1,),), ((3,),))
    assert (one.encoding, one.reading, one.meeting) == ((0, 2), (4,), (0, 2, 4))
    assert [one.owner_of(rank) for rank in (0, 2, 4)] == [0, 0, -1]
    assert [one.giver_of(rank) for rank in (0, 2, 4)] == [-1, 0, -1]


class Items(nn.Module):
    """Gives each item's length in rows."""

    def rows_per_item(self, clips: Any, lengths: list[int], scale: float = 1.0) -> list[int]:
        return lengths

    def forward(self, clips: Any, lengths: list[int], scale: float = 1.0) -> Any:
        raise AssertionError("not called")


class Dear(Items):
    def cost_per_item(self, clips: Any, lengths: list[int]) -> list[int]:
        return [length**2 for length in lengths]


def inputs(*lengths: int, width: int = 2, scale: float | None = None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "clips": torch.tensor([[float(n)] * width for n in lengths]).view(-1, width),
        "lengths": list(lengths),
    }
    return {"one": arguments if scale is None else arguments | {"scale": scale}}


def test_units_are_items_that_have_rows() -> None:
    submodule = VisionModalitySubmodules({"one": Dear()})
    assert units_of(submodule, 3, inputs(2, 0, 5), 7) == [
        Unit(batch=3, item=0, rows=2, cost=4.0),
        Unit(batch=3, item=2, rows=5, cost=25.0),
    ]


def test_a_unit_is_a_micro_batch_where_items_are_not_known() -> None:
    whole = [Unit(batch=0, item=None, rows=7, cost=7.0)]
    several = VisionModalitySubmodules({"one": Items(), "two": Items()})
    assert units_of(several, 0, inputs(7) | {"two": {}}, 7) == whole
    silent = VisionModalitySubmodules({"one": nn.Identity()})
    assert units_of(silent, 0, inputs(7), 7) == whole
    shuffled = VisionModalitySubmodules({"one": Items()})  # its projection merges rows by four
    assert units_of(shuffled, 0, inputs(28), 7) == whole


def test_calls_join_micro_batches_up_to_a_size() -> None:
    given = {0: inputs(1, 2, 3), 1: inputs(4), 2: inputs(2, width=3), 3: inputs(1, scale=2.0)}
    submodule = VisionModalitySubmodules({"one": Items()})
    units = [
        u
        for n, one in given.items()
        for u in units_of(submodule, n, one, sum(one["one"]["lengths"]))
    ]
    del units[1]  # another rank's
    calls = calls_of(units, given, most_rows=8)
    assert [call.rows for call in calls] == [8, 2, 1]
    assert calls[0].inputs["one"]["lengths"] == [1, 3, 4]
    assert calls[0].inputs["one"]["clips"][:, 0].tolist() == [1.0, 3.0, 4.0]
    small = calls_of(units, given, most_rows=1)
    assert [call.rows for call in small] == [1, 3, 4, 2, 1]


LAYOUTS = {
    "pp2": (geometry(dp=2), geometry(pp=2), False),
    "tp2": (geometry(dp=2), geometry(tp=2), False),
    "tp2 with sp": (geometry(dp=2), geometry(tp=2), True),
    "tp2-cp2-pp2": (geometry(dp=8), geometry(tp=2, cp=2, pp=2), False),
    "encoder tp2": (geometry(tp=2, dp=2), geometry(tp=2, pp=2), True),
    "over replicas": (geometry(tp=4), geometry(cp=2, dp=2), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_reach_who_places_them_and_gradients_who_made_them(name: str) -> None:
    """All ranks' routes at once, against a table of who has which row."""
    encoder, language, sequence_parallel = LAYOUTS[name]
    chance = torch.Generator().manual_seed(len(name))
    for pool in pools_of(encoder, language):
        encodings, sizes = random_encodings(pool, sequence_parallel, chance)
        routes = {
            rank: RowRoutes(pool, rank, encodings, sizes[pool.owner_of(rank)])
            for rank in pool.ranks
        }
        # a row is named by its micro-batch and number
        made = {rank: rows_of(pool.owner_of(rank), encodings) for rank in pool.ranks}
        read = deliver(pool, {r: one.forward() for r, one in routes.items()}, made)
        for replica, places in pool.readers.items():
            own = [(n, one) for n, one in enumerate(encodings) if one.replica == replica]
            for (cp, tp), rank in places.items():
                expected = []
                for number, one in own:
                    sources = one.placement.sources
                    rows = sources[cp, tp if (cp, tp) in sources else 0]
                    expected += [(number, row) for row in rows.tolist()]
                assert read[rank] == expected
        back = deliver(pool, {r: one.backward() for r, one in routes.items()}, read)
        assert back == made


def random_encodings(
    pool: Pool, sequence_parallel: bool, chance: torch.Generator
) -> tuple[list[Encoding], list[int]]:
    sizes = [0] * len(pool.owners)
    encodings = []
    for replica, places in pool.readers.items():
        for _ in range(3):
            count = int(torch.randint(0, 9, (), generator=chance))
            keys = [(cp, tp) for cp, tp in places if sequence_parallel or tp == 0]
            placed_N = torch.randint(0, len(keys), (count,), generator=chance)
            owner_N = torch.randint(0, len(pool.owners), (count,), generator=chance)
            at_N = torch.zeros(count, dtype=torch.long)
            for row, owner in enumerate(owner_N.tolist()):
                at_N[row] = sizes[owner]
                sizes[owner] += 1
            sources = {key: (placed_N == n).nonzero()[:, 0] for n, key in enumerate(keys)}
            placement = Placement(rows=count, sources=sources)
            encodings.append(
                Encoding(replica=replica, placement=placement, owner_N=owner_N, at_N=at_N)
            )
    return encodings, sizes


def rows_of(owner: int, encodings: list[Encoding]) -> list[tuple[int, int]]:
    return [
        (number, row)
        for number, one in enumerate(encodings)
        for row, its in enumerate(one.owner_N.tolist())
        if its == owner
    ]


def deliver(pool: Pool, routes: dict[int, Any], held: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """An all-to-all, by loops; every place of a result is filled once."""
    results: dict[int, list[Any]] = {rank: [None] * one.size for rank, one in routes.items()}
    for taker, result in results.items():
        for number, giver in enumerate(pool.ranks):
            given = routes[giver].give[pool.ranks.index(taker)].tolist()
            put = routes[taker].take[number].tolist()
            for source, target in zip(given, put, strict=True):
                assert result[target] is None
                result[target] = held[giver][source]
    return results
