"""The arguments that an encoder takes of each item, and how those of a micro-batch are joined.

There are three kinds of argument: of one shape (stacked into a tensor), of any size (a list of
tensors), and sizes that the encoder needs to know on the host (a list of Python numbers).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.data.sample import MediaItem, Sample

__all__ = ["MediaFormat", "check_item", "items_of", "join_items"]

Shape = tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class MediaFormat:
    """What the media of one encoder look like.

    Attributes:
        encoder: the encoder that takes them.
        inputs: dtype and shape, without batch dimension, of each of the encoder's arguments. A
            None in a shape stands for any size from 0; such an argument reaches the encoder as a
            list of tensors, one per item, others as one tensor [items, ...].
        on_host: arguments of integer dtype that reach the encoder as a list with a Python number
            per item, or (nested) tuples of numbers where an item's tensor has dimensions. For
            sizes that decide shapes: the encoder then never waits for the device to learn them.

    Raises:
        ConfigError: ``on_host`` names arguments that are not there or not of integer dtype, or a
            shape has a negative size.
    """

    encoder: str
    inputs: Mapping[str, tuple[torch.dtype, Shape]]
    on_host: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.on_host) - set(self.inputs))
        if unknown:
            raise ConfigError(
                f"format of encoder '{self.encoder}': on_host names {unknown}; expected some of "
                f"{sorted(self.inputs)}"
            )
        for name, (dtype, shape) in self.inputs.items():
            if name in self.on_host and (dtype.is_floating_point or dtype.is_complex):
                raise ConfigError(
                    f"format of encoder '{self.encoder}': on_host names {name!r}, which is "
                    f"{dtype}; only integers go to the encoder as Python numbers"
                )
            if any(size is not None and size < 0 for size in shape):
                raise ConfigError(
                    f"format of encoder '{self.encoder}': {name!r} has shape {list(shape)}; "
                    "expected sizes of at least 0, or None for any"
                )


def items_of(sample: Sample, modality: str) -> Iterator[tuple[int, MediaItem]]:
    """The sample's media of one modality, each with its place among all the sample's media."""
    return (pair for pair in enumerate(sample.media) if pair[1].modality == modality)


def check_item(where: str, item: MediaItem, formats: Sequence[MediaFormat]) -> None:
    """Refuse an item that none of its modality's encoders takes.

    Raises:
        InputError: unknown encoder, no rows, other arguments than the format's, or one of another
            dtype or shape; the message begins with ``where``.
    """
    by_encoder = {one.encoder: one for one in formats}
    if item.encoder not in by_encoder:
        raise InputError(
            f"{where}: encoder '{item.encoder}'; expected "
            f"{' or '.join(map(repr, by_encoder))}, the encoder of modality '{item.modality}'"
        )
    expected = by_encoder[item.encoder]
    if item.rows < 1:
        raise InputError(f"{where}: yields {item.rows} rows; expected at least one")
    if item.inputs.keys() != expected.inputs.keys():
        raise InputError(
            f"{where}: inputs {sorted(item.inputs)}; expected {sorted(expected.inputs)}"
        )
    for name, (dtype, shape) in expected.inputs.items():
        tensor = item.inputs[name]
        if tensor.dtype != dtype or not _fits(tuple(tensor.shape), shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}; "
                f"expected {dtype} [{wanted}]"
            )


def join_items(expected: MediaFormat, items: Sequence[MediaItem]) -> dict[str, Any]:
    """The arguments of one encoder's call for checked items; of no items, they are empty."""
    return {
        name: _join(
            [item.inputs[name] for item in items], dtype, shape, on_host=name in expected.on_host
        )
        for name, (dtype, shape) in expected.inputs.items()
    }


def _join(tensors: list[Tensor], dtype: torch.dtype, shape: Shape, *, on_host: bool) -> Any:
    if on_host:
        return [_numbers(tensor.tolist()) for tensor in tensors]
    if None in shape:
        return tensors
    sizes = [size for size in shape if size is not None]
    return torch.stack(tensors) if tensors else torch.empty((0, *sizes), dtype=dtype)


def _numbers(value: Any) -> Any:
    return tuple(map(_numbers, value)) if isinstance(value, list) else value


def _fits(actual: tuple[int, ...], shape: Shape) -> bool:
    return len(actual) == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(actual, shape, strict=True)
    )
