"""Every cut of a sequence: which positions a rank holds, and its share of what lies along them.

Context parallelism deals the sequence out in 2*cp equal chunks, chunk r and chunk 2*cp-1-r to
rank r, so that causal attention costs every rank the same. Packed sequences are dealt out
document by document. Sequence parallelism then cuts what a rank holds into contiguous pieces.

Legend: S sequence, B micro-batch, N rows of one stream, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from megatron.core.models.mimo.alignment.plan import AlignmentPlan, Stream
from megatron.core.models.mimo.alignment.rows import with_runs
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceCut:
    """How the sequences of one micro-batch are cut, and which share this rank takes.

    Plan, labels, masks, span numbers, positions and embeddings are all cut by one such value.
    Where nothing is cut (both sizes are 1), methods hand back the very object they are given.

    Attributes:
        cp_rank, cp_size: this rank among those of context parallelism.
        tp_rank, tp_size: this rank among those of sequence parallelism; 0 of 1 where it is off.
        places: of a packed sequence, int [documents + 1], the cumulative lengths of the documents
            with their padding; None for sequences that are not packed.
        only_length: the one S that is allowed; None for any.
    """

    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    places: torch.Tensor | None = None
    only_length: int | None = None
    _known: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def check_length(self, sequence_length: int) -> None:
        """Assert that rows of this length can be cut, where they are not packed.

        Raises:
            AssertionError: S is not divisible by 2*cp*tp (each where it applies), or differs from
                ``only_length``.
        """
        factor = self.tp_size * (2 * self.cp_size if self.cp_size > 1 else 1)
        # AssertionError is the public contract here (stock MIMO raises it), hence not ValueError.
        assert sequence_length % factor == 0, (
            f"sequence length {sequence_length} should be divisible by {factor} for "
            "sequence/context parallelism; pad it to "
            f"{-(-sequence_length // factor) * factor}"
        )
        assert self.only_length in (None, sequence_length), (
            f"TP Comm overlap needs sequences of exactly max_seq_len = {self.only_length}, "
            f"got {sequence_length}; pad them or turn tp_comm_overlap off"
        )

    def context_positions(self, sequence_length: int) -> torch.Tensor:
        """Positions that this context-parallel rank holds: long [S / cp], ascending."""
        if self.places is None:
            return context_parallel_positions(
                sequence_length, cp_rank=self.cp_rank, cp_size=self.cp_size
            )
        require_divisible(sequence_length, 2 * self.cp_size, "2*cp")
        return packed_context_parallel_positions(
            self.places, total_tokens=sequence_length, cp_rank=self.cp_rank, cp_size=self.cp_size
        )

    def context_share(self, whole: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This context-parallel rank's share of a tensor: S becomes S / cp along ``dim``.

        It is what labels, loss masks, span numbers and positions follow: losses and attention
        are computed after the tensor-parallel gather.
        """
        if self.cp_size == 1:
            return whole
        key = whole.size(dim), whole.device
        if key not in self._known:
            positions_S = self.context_positions(whole.size(dim))
            self._known[key] = positions_S.to(whole.device, non_blocking=True)
        return whole.index_select(dim, self._known[key])

    def rank_share(self, whole: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The share of the positions whose hidden states this rank holds: S / (cp * tp).

        Not for what needs a gradient: the other ranks' shares get none here.
        """
        return self.sequence_share(self.context_share(whole, dim), dim)

    def sequence_share(self, share: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This sequence-parallel rank's share of a ``context_share``, which gets no gradient."""
        if self.tp_size == 1:
            return share
        require_divisible(share.size(dim), self.tp_size, "tp")
        return share.chunk(self.tp_size, dim)[self.tp_rank].contiguous()

    def share_of_plan(self, plan: AlignmentPlan) -> AlignmentPlan:
        """The plan of the positions whose hidden states this rank holds.

        On the host (where the plan is made) it costs no synchronisation: a training loop cuts the
        plan before it moves the batch. Of a plan that another rank of the tensor-parallel group
        has cut, this rank's piece is taken.
        """
        if plan.positions_S is not None or plan.pieces:
            return self._own_piece(plan)
        if self.places is None:
            self.check_length(plan.sequence_length)
        device = plan.text_ids_N.device
        if self.cp_size > 1:
            plan = cut_plan(plan, self.context_positions(plan.sequence_length).to(device))
        if self.tp_size == 1:
            return plan
        pieces = []
        for tp_rank in range(self.tp_size):
            positions_S = sequence_parallel_positions(
                plan.sequence_length, tp_rank=tp_rank, tp_size=self.tp_size
            )
            pieces.append(cut_plan(plan, positions_S.to(device)))
        return self._own_piece(replace(plan, pieces=tuple(pieces)))

    def of_rank(self, *, cp_rank: int, tp_rank: int) -> SequenceCut:
        """The cut by which another rank takes its share of the same sequence."""
        tp_rank = tp_rank if self.tp_size > 1 else 0
        return replace(self, cp_rank=cp_rank, tp_rank=tp_rank, _known={})

    def _own_piece(self, plan: AlignmentPlan) -> AlignmentPlan:
        """This rank's part of a plan that is cut for all ranks of sequence parallelism."""
        if not plan.pieces or self.tp_size == 1 or plan.own_rows:
            return plan
        return replace(plan.pieces[self.tp_rank], pieces=plan.pieces)


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
        streams = with_runs(streams, plan.batch_size)
    return replace(
        plan,
        sequence_length=positions_S.numel(),
        text_ids_N=text_ids_N,
        streams=streams,
        positions_S=positions_S if plan.positions_S is None else plan.positions_S[positions_S],
        index=None,
    )


def with_own_rows(plan: AlignmentPlan) -> AlignmentPlan:
    """A plan for the modality rows that it places alone, in the order of ``sources_N``.

    Args:
        plan: this rank's; index tensors on the host.
    """
    streams = {
        name: stream if name == TEXT else Stream(rows_N=stream.rows_N)
        for name, stream in plan.streams.items()
    }
    counts = {name: streams[name].rows_N.numel() for name in plan.counts}
    return replace(
        plan,
        streams=with_runs(streams, plan.batch_size),
        counts=counts,
        encoders={},
        own_rows=True,
        index=None,
    )


def context_parallel_positions(sequence_length: int, *, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Positions of context-parallel rank ``cp_rank``: long [S / cp_size], ascending.

    Raises:
        InputError: S is not divisible by 2 * cp_size.
    """
    chunks = 2 * cp_size
    require_divisible(sequence_length, chunks, "2*cp")
    chunk = sequence_length // chunks
    positions_chunked = torch.arange(sequence_length).view(chunks, chunk)
    return positions_chunked[[cp_rank, chunks - 1 - cp_rank]].reshape(-1)


def packed_context_parallel_positions(
    cu_seqlens: torch.Tensor, *, total_tokens: int, cp_rank: int, cp_size: int
) -> torch.Tensor:
    """One rank's positions in a packed sequence: long [T / cp_size], without a wait for the device.

    Args:
        cu_seqlens: int [documents + 1], padded cumulative lengths, each length divisible by
            2 * cp_size; the last entry is ``total_tokens``.
        total_tokens: T.
        cp_rank: this rank in the context-parallel group.
        cp_size: size of that group.
    """
    position_T = torch.arange(total_tokens, device=cu_seqlens.device)
    document_T = torch.searchsorted(cu_seqlens[1:].long(), position_T, right=True)
    start_T = cu_seqlens.long()[document_T]
    chunk_T = (cu_seqlens[1:].long() - cu_seqlens[:-1].long())[document_T] // (2 * cp_size)
    piece_T = (position_T - start_T) // chunk_T.clamp(min=1)
    mine_T = (piece_T == cp_rank) | (piece_T == 2 * cp_size - 1 - cp_rank)
    return torch.nonzero_static(mine_T, size=total_tokens // cp_size).squeeze(1)


def sequence_parallel_positions(
    sequence_length: int, *, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """Positions of sequence-parallel rank ``tp_rank``: long [S / tp_size], contiguous.

    Raises:
        InputError: S is not divisible by tp_size.
    """
    require_divisible(sequence_length, tp_size, "tp")
    piece = sequence_length // tp_size
    return torch.arange(tp_rank * piece, (tp_rank + 1) * piece)


def require_divisible(sequence_length: int, factor: int, meaning: str) -> None:
    """Raise ``InputError`` where a sequence cannot be cut evenly, naming the length to pad to."""
    if sequence_length % factor:
        padded = -(-sequence_length // factor) * factor
        raise InputError(
            f"sequence length {sequence_length} is not divisible by {meaning} = {factor}; "
            f"pad it to {padded}"
        )
