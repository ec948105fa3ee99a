"""Boundaries of packed documents, from Megatron's ``PackedSeqParams``. T packed tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.partition.packing import numbers_on_host
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.mimo.layers.attention.tiles import Document

__all__ = ["boundaries_with_padding", "packed_documents"]

_ON_HOST = WeakTensorKeyDictionary()
"""Host copies of boundaries on a device, with the version they are of: every layer asks again."""


def packed_documents(
    packed: PackedSeqParams, *, query_tokens: int, key_tokens: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """The documents of queries and of keys.

    Args:
        packed: ``cu_seqlens_q`` and ``cu_seqlens_kv`` (the former's by default), integer
            [documents + 1], lengths summed from 0 on; with ``cu_seqlens_*_padded``, these are where
            documents begin and the former only say how long each is.
        query_tokens: T of queries, of the whole row.
        key_tokens: T of keys.

    Raises:
        InputError: sums that do not start at 0, fall, do not fit each other or exceed T.
    """
    queries = _documents(packed, "q", query_tokens)
    if packed.cu_seqlens_kv is None or (
        packed.cu_seqlens_kv is packed.cu_seqlens_q
        and packed.cu_seqlens_kv_padded is packed.cu_seqlens_q_padded
    ):
        return queries, queries
    keys = _documents(packed, "kv", key_tokens)
    if len(queries) != len(keys):
        raise InputError(
            f"cu_seqlens_q has {len(queries)} documents and cu_seqlens_kv {len(keys)}; "
            "give both the same number"
        )
    return queries, keys


def boundaries_with_padding(
    packed: PackedSeqParams, *, query_tokens: int, key_tokens: int
) -> tuple[Tensor, Tensor]:
    """Boundaries, where they lie, in which padding makes documents of its own, up to T.

    int32 [2 * documents + 2] for queries and for keys, or [documents + 2] where no padding is
    between documents; nothing waits for the device, and nothing is checked.
    """
    queries = _bounds(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, query_tokens)
    if packed.cu_seqlens_kv is None:
        return queries, queries
    return queries, _bounds(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded, key_tokens)


def _bounds(sums: Tensor, padded: Tensor | None, tokens: int) -> Tensor:
    end = torch.full((1,), tokens, dtype=torch.int32, device=sums.device)
    if padded is None:
        return torch.cat([sums.to(torch.int32), end])
    starts = padded[:-1].to(torch.int32)
    stops = starts + sums.diff().to(torch.int32)
    return torch.cat([torch.stack([starts, stops], dim=1).flatten(), padded[-1:].int(), end])


def _documents(packed: PackedSeqParams, name: str, tokens: int) -> tuple[Document, ...]:
    lengths = _lengths(packed, f"cu_seqlens_{name}")
    if lengths is None:
        raise InputError(f"packed_seq_params.cu_seqlens_{name} is None; a packed sequence needs it")
    places = _lengths(packed, f"cu_seqlens_{name}_padded")
    places = lengths if places is None else places
    if len(places) != len(lengths):
        raise InputError(
            f"cu_seqlens_{name} has {len(lengths)} documents and cu_seqlens_{name}_padded "
            f"{len(places)}; give both the same number"
        )
    for index, (length, place) in enumerate(zip(lengths, places, strict=True)):
        if length > place:
            raise InputError(
                f"document {index} has {length} tokens by cu_seqlens_{name} and a place for "
                f"{place} by cu_seqlens_{name}_padded; expected no more than the place"
            )
    if sum(places) > tokens:
        raise InputError(
            f"cu_seqlens_{name} covers {sum(places)} tokens, but the row has {tokens}; under "
            "context parallelism it is of the whole row, and every rank has 1/cp of it"
        )
    return tuple(Document(*pair) for pair in zip(lengths, places, strict=True))


def _lengths(packed: PackedSeqParams, name: str) -> list[int] | None:
    sums: Tensor | None = getattr(packed, name)
    if sums is None:
        return None
    values = numbers_on_host(packed, name)
    if values is None:
        values = _read(sums)
    lengths = [stop - start for start, stop in itertools.pairwise(values)]
    if sums.dim() != 1 or not values or values[0] != 0 or min(lengths, default=0) < 0:
        raise InputError(f"{name} is {values}; expected lengths summed up from 0: [0, 5, 12]")
    return lengths


def _read(sums: Tensor) -> list[int]:
    """The numbers of a boundary on a device; waits for it at the first call for a micro-batch."""
    version, values = _ON_HOST.get(sums, (None, []))
    if version != sums._version:
        values = [int(value) for value in sums.tolist()]
        _ON_HOST[sums] = (sums._version, values)
    return values
