"""Copying rows to where a plan says, and back.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megatron.core.models.mimo.alignment.plan import Run, Stream

# Rows that follow each other can be copied as one block, which beats an indexed copy on CPU
# once blocks are this long on average (measured: benchmarks/alignment.py, H=1024).
_MIN_MEAN_RUN = 8


def place_rows(out_SBH: torch.Tensor, stream: Stream, rows_NH: torch.Tensor) -> None:
    """Copy a stream's rows to where its plan says, in place, without a host synchronisation."""
    if stream.runs is not None:
        for run in stream.runs:
            target_NH = out_SBH[run.position : run.position + run.length, run.sample]
            target_NH.copy_(rows_NH[run.source : run.source + run.length])
        return
    if stream.sources_N is not None:
        rows_NH = rows_NH.index_select(0, stream.sources_N)
    out_SBH.view(-1, out_SBH.size(-1)).index_copy_(0, stream.rows_N, rows_NH)


def take_rows(merged_SBH: torch.Tensor, stream: Stream, num_rows: int) -> torch.Tensor:
    """The adjoint of ``place_rows``: [num_rows, H], zero where a row was placed nowhere here."""
    placed_NH = merged_SBH.reshape(-1, merged_SBH.size(-1)).index_select(0, stream.rows_N)
    if stream.sources_N is None:
        return placed_NH
    rows_NH = placed_NH.new_zeros(num_rows, placed_NH.size(1))
    return rows_NH.index_copy_(0, stream.sources_N, placed_NH)


def with_runs(streams: Mapping[str, Stream], batch_size: int) -> dict[str, Stream]:
    """The streams with their rows as blocks, where these are long; on the host."""
    return {
        name: replace(stream, runs=_find_runs(stream, batch_size))
        for name, stream in streams.items()
    }


def _find_runs(stream: Stream, batch_size: int) -> tuple[Run, ...] | None:
    num_rows = stream.rows_N.numel()
    if num_rows == 0:
        return ()
    sources_N = stream.sources_N
    if sources_N is None:
        sources_N = torch.arange(num_rows)
    breaks_N = (stream.rows_N.diff() != batch_size) | (sources_N.diff() != 1)
    starts_N = torch.cat([breaks_N.new_zeros(1, dtype=torch.long), breaks_N.nonzero()[:, 0] + 1])
    if num_rows < _MIN_MEAN_RUN * starts_N.numel():
        return None
    ends = [*starts_N[1:].tolist(), num_rows]
    rows = stream.rows_N[starts_N].tolist()
    sources = sources_N[starts_N].tolist()
    return tuple(
        Run(
            sample=row % batch_size,
            position=row // batch_size,
            source=source,
            length=end - start,
        )
        for start, end, row, source in zip(starts_N.tolist(), ends, rows, sources, strict=True)
    )
