"""Nested containers of tensors ("nests") between ranks: a small header, and large tensors as bytes.

A nest is a tensor, a number, a string, None, or a list, tuple or mapping by name of nests. The
header says how it is built and holds its small tensors (of integers and truth values, such as the
sizes of images); of large ones (of floating-point numbers, and bytes) it holds the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron.core.models.mimo.errors import InputError

_SMALL = (torch.bool, torch.int16, torch.int32, torch.int64)
_ALIGNED = 16  # bytes


def header_of(nest: Any) -> torch.Tensor:
    """A nest as uint8 [n] on the host, without the content of its large tensors.

    Raises:
        InputError: it holds something else than numbers, strings, None, tensors and containers of
            these.
    """
    small: list[torch.Tensor] = []
    text = json.dumps(_plain(nest, small)).encode()
    size = torch.tensor([len(text)])
    content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.cat([_bytes(size), content, *(_bytes(one.cpu()) for one in small)])


def read_header(header: torch.Tensor) -> Any:
    """The nest of a header: small tensors on the host, large ones on the device "meta"."""
    size = int(header[:8].clone().view(torch.int64).item())
    plain = json.loads(bytes(header[8 : 8 + size].tolist()))
    nest, _ = _nest(plain, header[8 + size :])
    return nest


def map_tensors(nest: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A nest with every tensor changed."""
    if torch.is_tensor(nest):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: map_tensors(one, change) for key, one in nest.items()}
    if isinstance(nest, list | tuple):
        return type(nest)(map_tensors(one, change) for one in nest)
    return nest


def large_bytes(nest: Any) -> torch.Tensor:
    """The content of the large tensors, uint8 [``size_of`` the nest] on their device."""
    parts = []
    for one in _large(nest):
        parts += [_bytes(one), _bytes(one).new_zeros(-one.nbytes % _ALIGNED)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def size_of(nest: Any) -> int:
    """Bytes of the large tensors, each begun at a multiple of sixteen."""
    return sum(one.nbytes + -one.nbytes % _ALIGNED for one in _large(nest))


def filled(nest: Any, content: torch.Tensor) -> Any:
    """The nest with its large tensors taken from ``large_bytes``, all on the content's device."""
    at = 0

    def take(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal at
        if tensor.dtype in _SMALL:
            return tensor.to(content.device)
        start, at = at, at + tensor.nbytes + -tensor.nbytes % _ALIGNED
        return content[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return map_tensors(nest, take)


def _large(nest: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def see(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in _SMALL:
            found.append(tensor)
        return tensor

    map_tensors(nest, see)
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _plain(value: Any, small: list[torch.Tensor]) -> Any:
    """What JSON holds; small tensors are put into a list, in order."""
    if torch.is_tensor(value):
        if value.dtype in _SMALL:
            small.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), [*value.shape]]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"map": {key: _plain(one, small) for key, one in value.items()}}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(one, small) for one in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"an encoder's input is a {type(value).__name__}, which does not travel to the ranks that "
        "encode; expected tensors, numbers, strings, None, and lists or mappings by name of these"
    )


def _nest(plain: Any, rest: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The inverse of ``_plain``, and what is left of the small tensors' bytes."""
    if not isinstance(plain, Mapping):
        return plain, rest
    ((kind, content),) = plain.items()
    if kind == "tensor":
        dtype, shape = getattr(torch, content[0]), content[1]
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if dtype not in _SMALL:
            return empty, rest
        own, rest = rest[: empty.nbytes], rest[empty.nbytes :]
        return own.clone().view(dtype).view(shape), rest
    if kind == "map":
        named = {}
        for key, one in content.items():
            named[key], rest = _nest(one, rest)
        return named, rest
    found: list[Any] = []
    for one in content:
        value, rest = _nest(one, rest)
        found.append(value)
    return (tuple(found) if kind == "tuple" else found), rest
