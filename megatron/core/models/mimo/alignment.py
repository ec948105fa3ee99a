"""Placeholder positions -> plan -> merged embeddings.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream (text or a modality), V
vocabulary; ``S_local`` after context/sequence sharding.

The rule: every occurrence of a modality's special token id in ``input_ids``, batch-major and left
to right, takes one row of that modality, in order. The plan states it as index tensors, made once
per micro-batch where ``input_ids`` are on the host; placing rows by a plan then never waits for
the device. Rows go straight to the decoder's layout [S, B, H]: one write per row, no zero
buffer, no mask of the merged size, no transposed copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError

# Rows that follow each other can be copied as one block, which beats an indexed copy on CPU
# once blocks are this long on average (measured: benchmarks/alignment.py, H=1024).
_MIN_MEAN_RUN = 8


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
    """

    sequence_length: int
    batch_size: int
    text_ids_N: torch.Tensor
    streams: Mapping[str, Stream]
    counts: Mapping[str, int] = field(default_factory=dict)
    positions_S: torch.Tensor | None = None
    pieces: tuple[AlignmentPlan, ...] = ()
    encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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
        )


def build_alignment_plan(
    input_ids_BS: torch.Tensor,
    special_token_ids: Mapping[str, int],
    *,
    vocab_size: int | None = None,
    row_order: Mapping[str, RowOrder] | None = None,
) -> AlignmentPlan:
    """Make the plan of a micro-batch; call it where ``input_ids`` are still on the host.

    Args:
        input_ids_BS: integer [B, S].
        special_token_ids: modality -> placeholder token id.
        vocab_size: V; when given, text ids are checked against it.
        row_order: for modalities whose rows do not come in the order of their placeholders, as
            those of several encoders.

    Raises:
        InputError: ids that are not an integer [B, S], negative, or outside the vocabulary; an
            order that is not each row of its modality once.
    """
    check_input_ids(input_ids_BS)
    batch_size, sequence_length = input_ids_BS.shape
    indices = {}
    is_text_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    for name, token_id in special_token_ids.items():
        is_modality_BS = input_ids_BS == token_id
        indices[name] = is_modality_BS.reshape(-1).nonzero().squeeze(1)
        is_text_BS &= ~is_modality_BS
    indices[TEXT] = is_text_BS.reshape(-1).nonzero().squeeze(1)
    plan = _make_plan(input_ids_BS, indices)
    _check_vocabulary(plan.text_ids_N, indices[TEXT], sequence_length, vocab_size)
    plan = _with_order(plan, row_order or {})
    if input_ids_BS.device.type != "cpu":
        return plan
    return replace(plan, streams=_with_runs(plan.streams, batch_size))


def media_span_ids(
    plan: AlignmentPlan, item_rows: Mapping[str, Sequence[int]] | None = None
) -> torch.Tensor:
    """Number the spans of media: int32 [B, S], 0 at text, one number for each item's tokens.

    Args:
        plan: of a whole micro-batch, on the host.
        item_rows: modality -> rows of each of its items, in the order of their placeholders; the
            modalities whose items are spans. None: all modalities, and an item is a run of
            placeholders without a gap.

    Raises:
        InputError: rows that do not add up to the modality's placeholders.
    """
    span_ids_BS = torch.zeros(plan.batch_size, plan.sequence_length, dtype=torch.int32)
    used = 0
    for name in plan.counts if item_rows is None else item_rows:
        rows_N = plan.streams[name].rows_N
        if not rows_N.numel():
            continue
        if item_rows is None:
            breaks_N = (rows_N.diff() != plan.batch_size).int()
            numbers_N = torch.cat([breaks_N.new_zeros(1), breaks_N.cumsum(0)])
        else:
            lengths = torch.tensor(item_rows[name])
            if int(lengths.sum()) != rows_N.numel():
                raise InputError(
                    f"items of {name} have {int(lengths.sum())} rows together, and input_ids "
                    f"{rows_N.numel()} placeholders; give the rows of every item"
                )
            numbers_N = torch.arange(len(lengths)).repeat_interleave(lengths)
        samples_N = rows_N % plan.batch_size
        positions_N = torch.div(rows_N, plan.batch_size, rounding_mode="floor")
        span_ids_BS[samples_N, positions_N] = (numbers_N + used + 1).int()
        used += int(numbers_N[-1]) + 1
    return span_ids_BS


def plan_from_indices(
    input_ids_BS: torch.Tensor, modality_token_indices: Mapping[str, torch.Tensor]
) -> AlignmentPlan:
    """Make a plan from flat batch-major positions, without a host synchronisation.

    Args:
        input_ids_BS: integer [B, S].
        modality_token_indices: modality, and "text", -> long [N], positions ``b * S + s``.

    Raises:
        InputError: "text" is missing, or the positions are not B * S; on the host also where they
            are not each position once.
    """
    check_input_ids(input_ids_BS)
    batch_size, sequence_length = input_ids_BS.shape
    given = sum(index_N.numel() for index_N in modality_token_indices.values())
    complete = TEXT in modality_token_indices and given == batch_size * sequence_length
    if complete and all(
        index_N.device.type == "cpu" for index_N in modality_token_indices.values()
    ):
        ordered = torch.cat([*modality_token_indices.values()]).sort().values
        complete = torch.equal(ordered, torch.arange(given))
    if not complete:
        raise InputError(
            f"modality_token_indices name {given} positions under "
            f"{sorted(modality_token_indices)}; expected the {batch_size} * {sequence_length} "
            f"positions of input_ids, each once, those of ordinary tokens under {TEXT!r}"
        )
    return _make_plan(input_ids_BS, modality_token_indices)


def _make_plan(input_ids_BS: torch.Tensor, indices: Mapping[str, torch.Tensor]) -> AlignmentPlan:
    batch_size, sequence_length = input_ids_BS.shape
    flat_ids = input_ids_BS.reshape(-1)
    streams = {
        name: Stream(
            rows_N=index_N % sequence_length * batch_size
            + torch.div(index_N, sequence_length, rounding_mode="floor")
        )
        for name, index_N in indices.items()
    }
    return AlignmentPlan(
        sequence_length=sequence_length,
        batch_size=batch_size,
        text_ids_N=flat_ids.index_select(0, indices[TEXT]),
        streams=streams,
        counts={name: index_N.numel() for name, index_N in indices.items() if name != TEXT},
    )


def cut_plan(plan: AlignmentPlan, positions_S: torch.Tensor) -> AlignmentPlan:
    """The part of a plan that a rank places when it holds only some positions.

    Args:
        plan: the plan of the sequence that is cut.
        positions_S: long [S_local], positions held, in the order in which they are held.

    Text rows of the part are those of its own ``text_ids_N``; modality rows are all there are,
    and ``sources_N`` says which of them go somewhere here.
    """
    local_S = positions_S.new_full((plan.sequence_length,), -1)
    local_S[positions_S] = torch.arange(positions_S.numel(), device=positions_S.device)
    text_ids_N = plan.text_ids_N
    streams: dict[str, Stream] = {}
    for name, stream in plan.streams.items():
        position_N = torch.div(stream.rows_N, plan.batch_size, rounding_mode="floor")
        sample_N = stream.rows_N % plan.batch_size
        local_N = local_S[position_N]
        kept_N = (local_N >= 0).nonzero().squeeze(1)
        rows_N = local_N[kept_N] * plan.batch_size + sample_N[kept_N]
        if name == TEXT:
            text_ids_N = text_ids_N[kept_N]
            streams[name] = Stream(rows_N=rows_N)
            continue
        sources_N = kept_N if stream.sources_N is None else stream.sources_N[kept_N]
        streams[name] = Stream(rows_N=rows_N, sources_N=sources_N)
    if positions_S.device.type == "cpu":
        streams = _with_runs(streams, plan.batch_size)
    return replace(
        plan,
        sequence_length=positions_S.numel(),
        text_ids_N=text_ids_N,
        streams=streams,
        positions_S=positions_S if plan.positions_S is None else plan.positions_S[positions_S],
    )


def check_input_ids(input_ids_BS: torch.Tensor) -> None:
    """Raise ``InputError`` unless ``input_ids`` are integers [B, S]."""
    if input_ids_BS.dim() != 2:
        raise InputError(
            f"input_ids have shape {tuple(input_ids_BS.shape)}; expected [batch, sequence] "
            "(add the batch dimension with unsqueeze(0))"
        )
    if input_ids_BS.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids are {input_ids_BS.dtype}; expected torch.int64 or torch.int32 token ids"
        )


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


def _moved(
    index: torch.Tensor | None, device: torch.device | str, non_blocking: bool
) -> torch.Tensor | None:
    return None if index is None else index.to(device, non_blocking=non_blocking)


def _with_order(plan: AlignmentPlan, row_order: Mapping[str, RowOrder]) -> AlignmentPlan:
    streams = dict(plan.streams)
    for name, order in row_order.items():
        count = plan.counts.get(name)
        whole = torch.arange(order.sources_N.numel())
        if order.sources_N.numel() != count or not torch.equal(order.sources_N.sort()[0], whole):
            raise InputError(
                f"row_order of {name!r} has {order.sources_N.numel()} rows for "
                f"{count} placeholders; expected each row number once"
            )
        streams[name] = replace(streams[name], sources_N=order.sources_N)
    encoders = {name: order.encoders for name, order in row_order.items()}
    return replace(plan, streams=streams, encoders=encoders)


def _check_vocabulary(
    text_ids_N: torch.Tensor, index_N: torch.Tensor, sequence_length: int, vocab_size: int | None
) -> None:
    wrong_N = text_ids_N < 0
    if vocab_size is not None:
        wrong_N |= text_ids_N >= vocab_size
    if not bool(wrong_N.any()):
        return
    first = int(wrong_N.nonzero()[0])
    sample, position = divmod(int(index_N[first]), sequence_length)
    bounds = "non-negative" if vocab_size is None else f"in 0..{vocab_size - 1}"
    raise InputError(
        f"input_ids[{sample}, {position}] is {int(text_ids_N[first])}; a token id has to be "
        f"{bounds}, unless it is the placeholder of a modality in special_token_ids"
    )


def _with_runs(streams: Mapping[str, Stream], batch_size: int) -> dict[str, Stream]:
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
