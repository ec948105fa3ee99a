"""Which sequence positions a rank holds. Legend: S sequence, T packed tokens.

Context parallelism deals the sequence out in 2*cp equal chunks, chunk r and chunk 2*cp-1-r to
rank r, so that causal attention costs every rank the same. Packed sequences are dealt out
document by document. Sequence parallelism then cuts what a rank holds into contiguous pieces.
"""

from __future__ import annotations

import torch

from megatron.core.models.mimo.errors import InputError


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
    """Positions of one rank in a packed row: long [T / cp_size], without a host synchronisation.

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
