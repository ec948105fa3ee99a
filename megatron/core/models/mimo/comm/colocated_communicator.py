"""Rows between two modules on the same ranks whose tensor- and data-parallel sizes differ.

The samples of a global micro-batch are dealt out to a module's data-parallel replicas in order. Of
two modules, one has at least as many replicas as the other: each of its replicas has a *piece* of
what a replica of the other has. Going to the side with fewer replicas, rows are gathered
("fan-in"); going to the side with more, each takes its piece ("fan-out"). Pieces may have any
number of rows, none included.

Every rank of a replica holds the same rows, so a rank that needs a piece takes it from itself where
it can, else from the rank of its own tensor-parallel index. Which ranks that are follows from the
grids' geometry, whatever the orders of their axes.

The gradient of a row is whole on every rank of the replica that reads it, and comes back whole to
every rank of the replica that made it: a sum over the encoder's data-parallel ranks is the sum over
samples, whatever the sizes.

Legend: N rows, B the batch axis of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.exchange import Routes, exchange_with_gradient
from megatron.core.models.mimo.config.grids import Geometry, connected
from megatron.core.models.mimo.errors import ConfigError, InputError

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid

_NO_COUNT = -1


@dataclass
class SliceInfo:
    """A rank's part of a batch axis."""

    start: int
    size: int


class BridgeDirection(StrEnum):
    """Which side has more data-parallel replicas.

    FAN_IN: the source; forward gathers, backward slices. FAN_OUT: the destination; forward slices,
    backward gathers. EQUAL: neither.
    """

    FAN_IN = "fan_in"
    FAN_OUT = "fan_out"
    EQUAL = "equal"


class ColocatedBridgeCommunicator:
    """Takes tensors from the source's layout to the destination's, and gradients back.

    Every rank of the default group makes one, with the same arguments, for groups are created.

    Args:
        src_grid, dest_grid: grids over the same ranks, with axes "tp" and "dp".
        src_module_name, dest_module_name: for errors.
        dim_mapping: "b" is the batch axis of the tensors, which is cut; by default ``{"b": 0,
            "s": 1, "h": 2}``. Encoder rows are ``{"b": 0, "h": 1}``.

    Attributes:
        rank_to_src_pos, rank_to_dest_pos: rank -> (data-parallel index, tensor-parallel index).
        gather_group_ranks: ranks that exchange rows, group by group; [] where none have to.
        gather_pg: this rank's group; None where no rows change ranks.
        direction, scale: which side has more replicas, and how many times as many.

    Raises:
        ConfigError: (a ``ValueError``) grids of different extents, without "tp" or "dp", with
            pipeline or context parallelism, or whose data-parallel sizes do not divide each other.
    """

    def __init__(
        self,
        src_grid: HyperCommGrid,
        dest_grid: HyperCommGrid,
        src_module_name: str = "src",
        dest_module_name: str = "dest",
        dim_mapping: dict[str, int] | None = None,
    ) -> None:
        self.src_grid, self.dest_grid = src_grid, dest_grid
        self.src_module_name, self.dest_module_name = src_module_name, dest_module_name
        self.dim_mapping = dim_mapping or {"b": 0, "s": 1, "h": 2}
        self.current_rank = dist.get_rank()
        _check_grids(src_grid, dest_grid)
        src, dest = Geometry.of(src_module_name, src_grid), Geometry.of(dest_module_name, dest_grid)
        self.src_tp_size, self.src_dp_size = src.sizes["tp"], src.sizes["dp"]
        self.dest_tp_size, self.dest_dp_size = dest.sizes["tp"], dest.sizes["dp"]
        self.rank_to_src_pos = {rank: (at.dp, at.tp) for rank, at in src.positions.items()}
        self.rank_to_dest_pos = {rank: (at.dp, at.tp) for rank, at in dest.positions.items()}
        self.scale, self.direction = 1, BridgeDirection.EQUAL
        if self.src_dp_size > self.dest_dp_size:
            self.direction = BridgeDirection.FAN_IN
            self.scale = self.src_dp_size // self.dest_dp_size
        elif self.src_dp_size < self.dest_dp_size:
            self.direction = BridgeDirection.FAN_OUT
            self.scale = self.dest_dp_size // self.src_dp_size
        fine, coarse = self.rank_to_src_pos, self.rank_to_dest_pos
        if self.is_fan_out():
            fine, coarse = coarse, fine
        self._pieces = _Pieces(fine, coarse, self.scale)
        self.gather_group_ranks = self._pieces.groups()
        self.gather_pg: dist.ProcessGroup | None = None
        if self.gather_group_ranks:
            own: Any = dist.new_subgroups_by_enumeration(self.gather_group_ranks)[0]
            self.gather_pg = own

    def is_fan_in(self) -> bool:
        """True where the source has more replicas: forward gathers."""
        return self.direction is BridgeDirection.FAN_IN

    def is_fan_out(self) -> bool:
        """True where the destination has more replicas: forward slices."""
        return self.direction is BridgeDirection.FAN_OUT

    def get_slice_info(self, batch_size: int) -> SliceInfo:
        """This rank's piece of a batch of ``batch_size`` that is cut evenly.

        Raises:
            InputError: (a ``ValueError``) it cannot be; ``communicate`` takes uneven pieces.
        """
        if self.direction is BridgeDirection.EQUAL:
            return SliceInfo(start=0, size=batch_size)
        self._check_even(batch_size)
        size = batch_size // self.scale
        piece = self._pieces.fine[self.current_rank][0]
        return SliceInfo(start=piece % self.scale * size, size=size)

    def communicate(self, tensor: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """The tensor as the destination's replica of this rank needs it; differentiable.

        All ranks of ``gather_pg`` take part: one all-gather of two integers, which the host waits
        for, and one all-to-all of the rows that change ranks; one more in backward.

        Args:
            tensor: equal on all ranks of the source's replica.
            count: rows along the batch axis that the destination's replica of this rank takes,
                which fan-out has to be told where pieces are uneven; None for even ones.

        Raises:
            InputError: (a ``ValueError``) fan-out of rows that cannot be cut evenly, without
                ``count``; counts that do not add up to the rows of their source.
        """
        axis = self.dim_mapping["b"]
        if self.gather_pg is None:
            return tensor.contiguous()
        if self.is_fan_out() and count is None:
            self._check_even(tensor.size(axis))
        rows = tensor.movedim(axis, 0)
        sizes = self._sizes_of_pieces(rows.size(0), count, tensor.device)
        here = dist.get_process_group_ranks(self.gather_pg)
        gather = self._pieces.gather_routes(self.current_rank, here, sizes)
        cut = self._pieces.slice_routes(self.current_rank, here, sizes)
        forward, back = (cut, gather) if self.is_fan_out() else (gather, cut)
        rows_NH = rows.reshape(rows.size(0), math.prod(rows.shape[1:]))
        taken_NH = exchange_with_gradient(rows_NH.contiguous(), forward, back, self.gather_pg)
        return taken_NH.reshape(taken_NH.size(0), *rows.shape[1:]).movedim(0, axis)

    def destroy(self) -> None:
        """Release the process group; a second call does nothing."""
        if self.gather_pg is not None:
            dist.destroy_process_group(self.gather_pg)
            self.gather_pg = None

    def _check_even(self, batch_size: int) -> None:
        if batch_size % self.scale:
            raise InputError(
                f"{self.src_module_name} -> {self.dest_module_name}: batch axis of {batch_size} is "
                f"not divisible by {self.direction.value} scale = {self.scale}; tell communicate "
                "the count of this rank's rows"
            )

    def _sizes_of_pieces(
        self, num_rows: int, count: int | None, device: torch.device
    ) -> dict[int, int]:
        """Number of rows of every piece that ranks of this group give or take."""
        group = self.gather_pg
        assert group is not None
        told = torch.tensor([num_rows, _NO_COUNT if count is None else count], device=device)
        everyone = told.new_empty(2 * dist.get_world_size(group))
        dist.all_gather_into_tensor(everyone, told, group=group)
        numbers = everyone.view(-1, 2).tolist()
        members = dist.get_process_group_ranks(group)
        pieces, sizes = self._pieces, dict[int, int]()
        for rank, (rows, taken) in zip(members, numbers, strict=True):
            if self.is_fan_out() and taken == _NO_COUNT:
                first = pieces.coarse[rank][0] * self.scale
                sizes |= dict.fromkeys(range(first, first + self.scale), rows // self.scale)
            else:
                sizes[pieces.fine[rank][0]] = taken if self.is_fan_out() else rows
        if self.is_fan_out():
            for rank, (rows, _) in zip(members, numbers, strict=True):
                takers = pieces.pieces_of(rank)
                total = sum(sizes[piece] for piece in takers)
                if total != rows:
                    raise InputError(
                        f"{self.src_module_name} gave {rows} rows on rank {rank}, and the "
                        f"{self.dest_module_name} replicas {[*takers]} that read them take "
                        f"{[sizes[piece] for piece in takers]} = {total}; give that encoder "
                        "replica the inputs of these replicas, in order"
                    )
        return sizes


class _Pieces:
    """Who has which piece, and who takes it from whom.

    Args:
        fine: rank -> (replica, tensor-parallel index) on the side with more replicas.
        coarse: the same on the other side.
        scale: pieces of a replica of the coarse side.
    """

    def __init__(
        self,
        fine: Mapping[int, tuple[int, int]],
        coarse: Mapping[int, tuple[int, int]],
        scale: int,
    ) -> None:
        self.fine, self.coarse, self.scale = fine, coarse, scale

    def pieces_of(self, rank: int) -> range:
        """The pieces that make up what a rank's replica of the coarse side has."""
        first = self.coarse[rank][0] * self.scale
        return range(first, first + self.scale)

    def giver_to_gather(self, rank: int, piece: int) -> int:
        """The rank of the fine side from which ``rank`` takes a piece."""
        return self._nearest(rank, [r for r, at in self.fine.items() if at[0] == piece])

    def giver_of_slice(self, rank: int) -> int:
        """The rank of the coarse side from which ``rank`` takes its own piece."""
        replica = self.fine[rank][0] // self.scale
        return self._nearest(rank, [r for r, at in self.coarse.items() if at[0] == replica])

    def groups(self) -> list[list[int]]:
        """Ranks that exchange rows, in the order of their pieces; [] where all take their own."""
        links = [
            (rank, giver)
            for rank in self.fine
            for giver in (
                self.giver_of_slice(rank),
                *(self.giver_to_gather(rank, piece) for piece in self.pieces_of(rank)),
            )
        ]
        if all(one == other for one, other in links):
            return []
        groups = [sorted(group, key=self._order) for group in connected([*self.fine], links)]
        return sorted(groups, key=lambda group: self._group_order(group[0]))

    def gather_routes(self, rank: int, here: list[int], sizes: Mapping[int, int]) -> Routes:
        """Routes by which ``rank`` gets all pieces of its coarse replica, in order."""
        pieces = self.pieces_of(rank)
        starts = [0, *accumulate(sizes[piece] for piece in pieces)]
        own = self.fine[rank][0]
        give, take = [], []
        for other in here:
            wants = own in self.pieces_of(other) and self.giver_to_gather(other, own) == rank
            give.append(torch.arange(sizes[own] if wants else 0))
            spans = [
                torch.arange(start, start + sizes[piece])
                for piece, start in zip(pieces, starts, strict=False)
                if self.giver_to_gather(rank, piece) == other
            ]
            take.append(torch.cat([torch.empty(0, dtype=torch.long), *spans]))
        return Routes(give=tuple(give), take=tuple(take), size=starts[-1])

    def slice_routes(self, rank: int, here: list[int], sizes: Mapping[int, int]) -> Routes:
        """Routes by which ``rank`` gets its piece."""
        pieces = self.pieces_of(rank)
        starts = [0, *accumulate(sizes[piece] for piece in pieces)]
        own, giver = self.fine[rank][0], self.giver_of_slice(rank)
        give, take = [], []
        for other in here:
            piece = self.fine[other][0]
            wants = piece in pieces and self.giver_of_slice(other) == rank
            start = starts[piece - pieces[0]] if wants else 0
            give.append(torch.arange(start, start + (sizes[piece] if wants else 0)))
            take.append(torch.arange(sizes[own] if other == giver else 0))
        return Routes(give=tuple(give), take=tuple(take), size=sizes[own])

    def _nearest(self, rank: int, candidates: list[int]) -> int:
        if rank in candidates:
            return rank
        index = self.fine[rank][1]
        return min(candidates, key=lambda other: (self.fine[other][1] != index, other))

    def _order(self, rank: int) -> tuple[int, int]:
        return self.fine[rank][0], rank

    def _group_order(self, first: int) -> tuple[int, int]:
        replica, index = self.fine[first]
        return replica // self.scale, index


def _check_grids(src_grid: HyperCommGrid, dest_grid: HyperCommGrid) -> None:
    if src_grid.size != dest_grid.size:
        raise ConfigError(
            "Grids must span same number of ranks: "
            f"src={src_grid.size}, dest={dest_grid.size}; give both the same extent"
        )
    if src_grid.rank_offset != dest_grid.rank_offset:
        raise ConfigError(
            "Grids must have same rank offset: "
            f"src={src_grid.rank_offset}, dest={dest_grid.rank_offset}; give both the same extent"
        )
    for side, grid in (("src", src_grid), ("dest", dest_grid)):
        sizes = dict(zip(grid.dim_names, grid.shape, strict=True))
        for axis in ("tp", "dp"):
            if axis not in sizes:
                raise ConfigError(
                    f"{side} grid must have '{axis}' dimension, it has {grid.dim_names}; add it, "
                    "of size 1 where it is not used"
                )
        for axis in ("pp", "cp"):
            if sizes.get(axis, 1) != 1:
                raise ConfigError(
                    f"{side} {axis.upper()} must be 1 for ColocatedBridgeCommunicator, got "
                    f"{sizes[axis]}; the schedule EncodeFirst runs encoders beside a language "
                    "model that is parallel so"
                )
    src_dp = src_grid.shape[src_grid.dim_names.index("dp")]
    dest_dp = dest_grid.shape[dest_grid.dim_names.index("dp")]
    if src_dp % dest_dp and dest_dp % src_dp:
        raise ConfigError(
            f"DP sizes must be evenly divisible: src_dp={src_dp}, dest_dp={dest_dp}; choose sizes "
            "of which one divides the other, or use the schedule EncodeFirst"
        )
