"""Packed sequences: where the documents of a row [1, T] begin and end. T packed tokens.

Lengths are known where a batch is made. Given as Python integers (or host tensors) they are
checked here and cost no wait for the device; tensors on a device are taken as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from megatron.core.models.mimo.errors import InputError, UnsupportedError
from megatron.core.packed_seq_params import PackedSeqParams

_BOUNDARIES = (
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "cu_seqlens_q_padded",
    "cu_seqlens_kv_padded",
)
_GROUPS = ("cp_group", "local_cp_size")
_ALIGNED = 4  # int32 numbers: boundaries share a tensor, and each begins at 16 bytes


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """A packed sequence with what fused attention wants besides, made once for all layers.

    Attributes:
        bounds_q: int32, boundaries of queries in which padding counts as further documents, none of
            them longer than ``max_seqlen_q``; None where they are not known on the host.
        bounds_kv: the same boundaries of keys.
        on_host: the numbers of ``cu_seqlens_*``, by name, as far as they are known on the host.
        kernel_calls: what the first layer learned about the kernels that serve this row, for the
            others; its keys and values are the attention's.
    """

    bounds_q: torch.Tensor | None = None
    bounds_kv: torch.Tensor | None = None
    on_host: Mapping[str, list[int]] = field(default_factory=dict, repr=False)
    kernel_calls: dict[Any, Any] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )


def packed_params(
    packing_kwargs: Mapping[str, Any] | None,
    *,
    tokens: int | None = None,
    cp_size: int = 1,
    device: torch.device | None = None,
    bounds_device: torch.device | None = None,
) -> PackedRow | None:
    """THD parameters of one packed sequence; None for None.

    Whether padding is between documents is said where lengths are known, so that no attention asks
    the device for it.

    Args:
        packing_kwargs: arguments of ``PackedSeqParams``. Boundaries are cumulative lengths from 0
            on: integers, or a tensor [documents + 1]. ``cu_seqlens_kv`` is ``cu_seqlens_q`` where
            it is left out, and ``max_seqlen_*`` the longest document with its padding.
        tokens: T; with padded boundaries, documents' places have to fill it.
        cp_size: context-parallel size; each document's place is a multiple of 2 * cp_size.
        device: where boundaries given as integers go; None leaves them on the host.
        bounds_device: where ``bounds_q`` and ``bounds_kv`` go, with the others by default.

    Raises:
        InputError: unknown arguments, or boundaries that do not fit each other, T or cp_size.
        UnsupportedError: a context-parallel group of its own for one row.
    """
    if packing_kwargs is None:
        return None
    known = {field.name for field in fields(PackedSeqParams)}
    unknown = sorted(set(packing_kwargs) - known)
    if unknown:
        raise InputError(f"packing_kwargs have {unknown}; expected arguments of PackedSeqParams")
    if packing_kwargs.get("qkv_format") not in (None, "thd"):
        raise InputError(
            f"packing_kwargs have qkv_format {packing_kwargs['qkv_format']!r}; a packed "
            "sequence is 'thd': leave it out"
        )
    own_groups = [name for name in _GROUPS if packing_kwargs.get(name) is not None]
    if own_groups:
        raise UnsupportedError(
            f"packing_kwargs have {own_groups}; every row is cut over the model's context-parallel "
            "group: leave them out"
        )
    boundaries = _boundaries(packing_kwargs)
    longest = _check(boundaries, tokens, cp_size)
    arguments = {name: value for name, value in packing_kwargs.items() if value is not None}
    arguments |= _as_tensors(boundaries, packing_kwargs, device, bounds_device or device)
    if arguments.get("pad_between_seqs") is None:
        arguments["pad_between_seqs"] = _has_padding(boundaries)
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        given = arguments.get("max_seqlen_q", longest)
        if arguments.setdefault(name, given) is None:
            raise InputError(
                f"packing_kwargs lack {name}, and the boundaries are on a device, where reading "
                "them would wait for it; give the longest document's length, or host boundaries"
            )
    on_host = {name: values for name, values in boundaries.items() if values is not None}
    return PackedRow(**{**arguments, "qkv_format": "thd"}, on_host=on_host)


def numbers_on_host(packed: PackedSeqParams, name: str) -> list[int] | None:
    """The numbers of a boundary, where they are known without a wait for the device.

    Args:
        packed: a packed sequence.
        name: name of the boundary: ``cu_seqlens_q`` and so on.
    """
    known = packed.on_host.get(name) if isinstance(packed, PackedRow) else None
    if known is not None:
        return known
    boundary = getattr(packed, name)
    return None if boundary is None else _host_values(boundary)


def check_one_row(**tensors: torch.Tensor | None) -> int | None:
    """T of a packed sequence, from whichever of the tensors [..., B, T] is at hand.

    Raises:
        InputError: one has B other than 1.
    """
    tokens = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() < 2 or tensor.size(-2) != 1:
            raise InputError(
                f"{name} has shape {list(tensor.shape)} with packing_kwargs; a packed "
                "micro-batch is one row [1, T]: join all documents in it"
            )
        tokens = tensor.size(-1)
    return tokens


def _boundaries(packing_kwargs: Mapping[str, Any]) -> dict[str, list[int] | None]:
    """Host values of each boundary that is given; None for one that is on a device."""
    if packing_kwargs.get("cu_seqlens_q") is None:
        raise InputError(
            "packing_kwargs lack cu_seqlens_q; expected cumulative lengths of the documents: "
            "[0, 5, 12]"
        )
    return {
        name: _host_values(packing_kwargs[name])
        for name in _BOUNDARIES
        if packing_kwargs.get(name) is not None
    }


def _host_values(value: torch.Tensor | Sequence[int]) -> list[int] | None:
    if not torch.is_tensor(value):
        return [int(number) for number in value]
    return value.flatten().tolist() if value.device.type == "cpu" else None


def _check(
    boundaries: Mapping[str, list[int] | None], tokens: int | None, cp_size: int
) -> int | None:
    """Check what is on the host; the longest place of a document, None where it is not known."""
    places: list[int] = []
    for kind in ("q", "kv"):
        sums = boundaries.get(f"cu_seqlens_{kind}")
        padded = boundaries.get(f"cu_seqlens_{kind}_padded", sums)
        if sums is None or padded is None:
            continue
        name = f"cu_seqlens_{kind}"
        lengths, rooms = _lengths(name, sums), _lengths(f"{name}_padded", padded)
        if len(lengths) != len(rooms) or any(a > b for a, b in zip(lengths, rooms, strict=False)):
            raise InputError(
                f"{name} {sums} does not fit {name}_padded {padded}; expected a place for each "
                "document, at least as long as the document"
            )
        _check_places(f"{name}_padded" if padded is not sums else name, rooms, tokens, cp_size)
        places += rooms
    return max(places, default=None)


def _lengths(name: str, sums: list[int]) -> list[int]:
    lengths = [stop - start for start, stop in itertools.pairwise(sums)]
    if not lengths or sums[0] != 0 or min(lengths) < 0:
        raise InputError(f"{name} is {sums}; expected lengths summed up from 0: [0, 5, 12]")
    return lengths


def _check_places(name: str, places: list[int], tokens: int | None, cp_size: int) -> None:
    if tokens is not None and sum(places) != tokens:
        raise InputError(
            f"{name} covers {sum(places)} of the row's {tokens} tokens; expected all: padding "
            "behind the last document is the place of a document without tokens"
        )
    factor = 2 * cp_size if cp_size > 1 else 1
    for number, place in enumerate(places):
        if place % factor:
            raise InputError(
                f"document {number} of the packed sequence takes {place} tokens, not divisible by "
                f"2*cp = {factor}; pad it to {-(-place // factor) * factor} and give "
                "cu_seqlens_q_padded"
            )


def _has_padding(boundaries: Mapping[str, list[int] | None]) -> bool | None:
    """Whether a document is shorter than its place; None where that is not known on the host."""
    if None in boundaries.values():
        return None
    return any(
        boundaries.get(f"cu_seqlens_{kind}_padded", boundaries.get(f"cu_seqlens_{kind}"))
        != boundaries.get(f"cu_seqlens_{kind}")
        for kind in ("q", "kv")
    )


def _as_tensors(
    boundaries: Mapping[str, list[int] | None],
    packing_kwargs: Mapping[str, Any],
    device: torch.device | None,
    bounds_device: torch.device | None,
) -> dict[str, torch.Tensor]:
    """int32 boundaries. Those with equal numbers are one tensor."""
    known = {name: values for name, values in boundaries.items() if values is not None}
    bounds: dict[str, list[int]] = {}
    for kind in ("q", "kv"):
        sums = known.get(f"cu_seqlens_{kind}")
        places = boundaries.get(f"cu_seqlens_{kind}_padded", sums)
        if sums is not None and places is not None:
            bounds[f"bounds_{kind}"] = _bounds(sums, places)
    if bounds_device == device:
        tensors = _placed(known | bounds, device)
    else:
        tensors = _placed(known, device) | _placed(bounds, bounds_device)
    for name, values in boundaries.items():
        if values is None:
            tensors[name] = packing_kwargs[name].to(torch.int32)
    given = {name for name in _BOUNDARIES if packing_kwargs.get(name) is not None}
    for suffix in ("", "_padded"):
        q_name, kv_name = f"cu_seqlens_q{suffix}", f"cu_seqlens_kv{suffix}"
        same = kv_name not in given or packing_kwargs[kv_name] is packing_kwargs.get(q_name)
        if q_name in tensors and same:
            tensors[kv_name] = tensors[q_name]
    if "bounds_q" in tensors and not given & {"cu_seqlens_kv", "cu_seqlens_kv_padded"}:
        tensors["bounds_kv"] = tensors["bounds_q"]
    return tensors


def _bounds(sums: list[int], places: list[int]) -> list[int]:
    """Boundaries in which the padding behind a document is a document of its own."""
    if sums == places:
        return sums
    lengths = [stop - start for start, stop in itertools.pairwise(sums)]
    ends = [start + length for start, length in zip(places, lengths, strict=False)]
    inner = [bound for pair in zip(places, ends, strict=False) for bound in pair]
    return [*inner, places[-1]]


def _placed(
    values: Mapping[str, list[int]], device: torch.device | None
) -> dict[str, torch.Tensor]:
    """A tensor of each list, all of them in one copy to the device; equal lists share one."""
    starts: dict[tuple[int, ...], int] = {}
    flat: list[int] = []
    for numbers in values.values():
        if starts.setdefault(tuple(numbers), len(flat)) == len(flat):
            flat += [*numbers, *[0] * (-len(numbers) % _ALIGNED)]
    whole = torch.tensor(flat, dtype=torch.int32)
    if device is not None and device.type != "cpu":
        whole = whole.pin_memory().to(device, non_blocking=True)
    pieces = {key: whole[start : start + len(key)] for key, start in starts.items()}
    return {name: pieces[tuple(numbers)] for name, numbers in values.items()}
