"""Rows between colocated grids: uneven, of any ratio and any order of axes, forward and backward.

Legend: N rows, H features.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool

WIDTH = 3
SEED = 20261127


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two grids over all ranks, and the rows of every piece of the side with more replicas."""

    src: tuple[int, int]  # tp, dp
    dest: tuple[int, int]
    src_order: tuple[str, str]
    dest_order: tuple[str, str]
    rows: tuple[int, ...]


def random_cases(world: int, number: int) -> list[Case]:
    """Sizes whose data-parallel sizes divide each other, in any order of axes."""
    chance = random.Random(SEED + world)
    sizes = [(tp, world // tp) for tp in range(1, world + 1) if world % tp == 0]
    cases = []
    while len(cases) < number:
        src, dest = chance.choice(sizes), chance.choice(sizes)
        if src[1] % dest[1] and dest[1] % src[1]:
            continue
        pieces = max(src[1], dest[1])
        cases.append(
            Case(
                src=src,
                dest=dest,
                src_order=chance.choice([("tp", "dp"), ("dp", "tp")]),
                dest_order=chance.choice([("tp", "dp"), ("dp", "tp")]),
                rows=tuple(chance.choice([0, 0, 1, 2, 5]) for _ in range(pieces)),
            )
        )
    return cases


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_rows_and_gradients_arrive_where_they_belong(ranks: RankPool, world: int) -> None:
    for found in ranks(world)(run_cases, random_cases(world, 12 if world > 1 else 2)):
        for case, right in found:
            assert right, f"seed {SEED + world}: {case}"


def grid_of(sizes: tuple[int, int], order: tuple[str, str]) -> Any:
    from megatron.core.hyper_comm_grid import HyperCommGrid

    by_name = dict(zip(("tp", "dp"), sizes, strict=True))
    return HyperCommGrid([by_name[name] for name in order], list(order))


def run_cases(cases: list[Case]) -> list[tuple[Case, bool]]:
    return [(case, run_case(case)) for case in cases]


def run_case(case: Case) -> bool:
    """Sends numbered rows, and numbered gradients back; whether all of them are right here."""
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

    grids = grid_of(case.src, case.src_order), grid_of(case.dest, case.dest_order)
    bridge = ColocatedBridgeCommunicator(*grids, dim_mapping={"b": 0, "h": 1})
    here = torch.distributed.get_rank()

    def numbers(dp: int, replica: int) -> torch.Tensor:
        """The numbers of the rows that a replica has, of a side with ``dp`` of them."""
        share = len(case.rows) // dp
        first = sum(case.rows[: replica * share])
        count = sum(case.rows[replica * share : (replica + 1) * share])
        return torch.arange(first, first + count).float()

    src_N = numbers(case.src[1], bridge.rank_to_src_pos[here][0])
    dest_N = numbers(case.dest[1], bridge.rank_to_dest_pos[here][0])
    rows_NH = src_N[:, None].repeat(1, WIDTH).requires_grad_()
    taken_NH = bridge.communicate(rows_NH, count=len(dest_N))
    (taken_NH * (dest_N[:, None] + 100)).sum().backward()
    right = torch.equal(taken_NH.detach(), dest_N[:, None].repeat(1, WIDTH))
    right &= rows_NH.grad is not None and torch.equal(
        rows_NH.grad, (src_N[:, None] + 100).repeat(1, WIDTH)
    )
    bridge.destroy()
    bridge.destroy()
    return right and bridge.gather_pg is None


def test_public_face(ranks: RankPool) -> None:
    fan_in, fan_out, equal = ranks(4)(describe)[3]
    # what megatron-core 0.19's own says for these grids
    assert fan_in == (
        {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (3, 0)},
        {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)},
        [[0, 1], [2, 3]],
        "fan_in",
        2,
        (True, False),
        (3, 3),
        "batch axis of 5 is not divisible by fan_in scale = 2",
    )
    assert fan_out[2:7] == ([[0, 1], [2, 3]], "fan_out", 2, (False, True), (3, 3))
    assert "not divisible by fan_out" in fan_out[7]
    assert equal[2:7] == ([], "equal", 1, (False, False), (0, 6))


def describe() -> list[tuple[Any, ...]]:
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

    order = ("tp", "dp")
    found = []
    for src, dest in (((1, 4), (2, 2)), ((2, 2), (1, 4)), ((2, 2), (2, 2))):
        bridge = ColocatedBridgeCommunicator(grid_of(src, order), grid_of(dest, order), "v", "l")
        part, said = bridge.get_slice_info(6), ""
        try:
            bridge.get_slice_info(5)
        except ValueError as error:
            said = str(error)
        text = said.partition(": ")[2].partition(";")[0]
        found.append(
            (
                bridge.rank_to_src_pos,
                bridge.rank_to_dest_pos,
                bridge.gather_group_ranks,
                bridge.direction.value,
                bridge.scale,
                (bridge.is_fan_in(), bridge.is_fan_out()),
                (part.start, part.size),
                text,
            )
        )
        sbh = torch.full((2, 4, 3), float(torch.distributed.get_rank()))
        assert (
            ColocatedBridgeCommunicator(
                bridge.src_grid, bridge.dest_grid, dim_mapping={"s": 0, "b": 1, "h": 2}
            )
            .communicate(sbh)
            .shape
            == {
                "fan_in": (2, 8, 3),
                "fan_out": (2, 2, 3),
                "equal": (2, 4, 3),
            }[bridge.direction.value]
        )
    return found


REFUSED = {
    "size": (((1, 2), 0), ((1, 4), 0), "span same number of ranks"),
    "offset": (((1, 2), 0), ((1, 2), 2), "same rank offset"),
    "ratio": (((2, 3), 0), ((3, 2), 0), "evenly divisible"),
}


def test_refusals(ranks: RankPool) -> None:
    for said in ranks(6)(collect_refusals):
        for case, (_, _, text) in REFUSED.items():
            assert text in said[case]
        assert "src grid must have 'tp' dimension" in said["no tp"]
        assert "dest PP must be 1" in said["pp"]
        assert "dest CP must be 1" in said["cp"]
        assert "take [1, 1, 1] = 3" in said["counts"]


def collect_refusals() -> dict[str, str]:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

    said = {}

    def hear(case: str, act: Any) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is what is asked for
            act()
        said[case] = str(error.value)

    for case, (src, dest, _) in REFUSED.items():
        grids = [HyperCommGrid(list(shape), ["tp", "dp"], offset) for shape, offset in (src, dest)]
        hear(case, lambda grids=grids: ColocatedBridgeCommunicator(*grids))
    plain = HyperCommGrid([2, 3], ["tp", "dp"])
    hear("no tp", lambda: ColocatedBridgeCommunicator(HyperCommGrid([6], ["dp"]), plain))
    for axis in ("pp", "cp"):
        other = HyperCommGrid([1, 3, 2], ["tp", "dp", axis])
        hear(axis, lambda other=other: ColocatedBridgeCommunicator(plain, other))
    bridge = ColocatedBridgeCommunicator(
        HyperCommGrid([6, 1], ["tp", "dp"]), HyperCommGrid([2, 3], ["tp", "dp"])
    )
    hear("counts", lambda: bridge.communicate(torch.zeros(4, 1, 1), count=1))
    return said
