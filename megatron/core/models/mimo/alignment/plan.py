"""Where the rows of every stream go, as values; ``from_ids`` and ``cut`` make them.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream (text or a modality);
``S_local`` after context/sequence sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.models.mimo.alignment.row_index import RowIndex


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Consecutive rows of a stream that take consecutive positions of one sample."""

    sample: int
    position: int
    source: int
    length: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Where the rows of one stream go.

    Attributes:
        rows_N: long [N], flat row ``s * B + b`` of the merged [S, B, H] for each row placed.
        sources_N: long [N], which row of the stream it is; None when all are placed in order.
        runs: the same as blocks, None where blocks are short or the plan was made on a device.
    """

    rows_N: torch.Tensor
    sources_N: torch.Tensor | None = None
    runs: tuple[Run, ...] | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Stream:
        """The same stream with its index tensors on ``device``; runs are for the host only."""
        return replace(
            self,
            runs=self.runs if torch.device(device).type == "cpu" else None,
            rows_N=self.rows_N.to(device, non_blocking=non_blocking),
            sources_N=_moved(self.sources_N, device, non_blocking),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """Which row of a modality each of its placeholders takes.

    Attributes:
        sources_N: long [N], each of 0..N-1 once.
        encoders: names of the modality's encoders, in the order in which it concatenates their
            rows.
    """

    sources_N: torch.Tensor
    encoders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentPlan:
    """Index tensors that merge a micro-batch.

    Attributes:
        sequence_length: S of the merged embeddings (``S_local`` after a cut).
        batch_size: B.
        text_ids_N: long [N_text], token ids to look up, placeholders left out, batch-major.
        streams: "text" and every modality -> where its rows go.
        counts: modality -> placeholders in the whole micro-batch, which is how many rows its
            encoders have to give (host integers; a cut leaves them as they are).
        positions_S: long [S_local], positions of the uncut sequence that this plan fills; None
            before a cut.
        pieces: under sequence parallelism, the plans of all tensor-parallel ranks by rank, this
            one's among them; () otherwise.
        encoders: modality -> its encoders in the order of their rows, where the plan depends on
            it: where ``row_order`` was given.
        own_rows: the modality rows that are merged by it are those that this rank places alone,
            in the order in which the streams name their places; ``counts`` are theirs.
        index: the same for kernels, where ``with_row_index`` has made it; a cut drops it.
    """

    sequence_length: int
    batch_size: int
    text_ids_N: torch.Tensor
    streams: Mapping[str, Stream]
    counts: Mapping[str, int] = field(default_factory=dict)
    positions_S: torch.Tensor | None = None
    pieces: tuple[AlignmentPlan, ...] = ()
    encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_rows: bool = False
    index: RowIndex | None = None

    def row_order(self) -> dict[str, RowOrder]:
        """What ``build_alignment_plan`` was given as ``row_order``; of a plan that is not cut."""
        return {
            name: RowOrder(sources_N=sources_N, encoders=encoders)
            for name, encoders in self.encoders.items()
            if (sources_N := self.streams[name].sources_N) is not None
        }

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AlignmentPlan:
        """The same plan with its index tensors on ``device``."""
        return replace(
            self,
            text_ids_N=self.text_ids_N.to(device, non_blocking=non_blocking),
            streams={
                name: stream.to(device, non_blocking=non_blocking)
                for name, stream in self.streams.items()
            },
            positions_S=_moved(self.positions_S, device, non_blocking),
            pieces=tuple(piece.to(device, non_blocking=non_blocking) for piece in self.pieces),
            index=None if self.index is None else self.index.to(device, non_blocking=non_blocking),
        )


def _moved(
    index: torch.Tensor | None, device: torch.device | str, non_blocking: bool
) -> torch.Tensor | None:
    return None if index is None else index.to(device, non_blocking=non_blocking)
