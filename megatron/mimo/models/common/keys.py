"""Which parameter is which in Hugging Face's format: one table, read in both directions.

A table is data. An entry says that one parameter of ours, by its name in the module tree, is made
of one or more Hugging Face weights, and by which transform; ``{i}`` in its names stands for a
layer's number. Nothing here knows of files, checkpoints or process groups.

Legend: O output features, I input features, V vocabulary.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError

__all__ = [
    "Concatenated",
    "FusedQKV",
    "JoinedQKV",
    "KeyEntry",
    "KeyTable",
    "PaddedVocabulary",
    "Reshaped",
    "Same",
    "Transform",
    "Transposed",
]


class Transform(Protocol):
    """Both directions of a conversion; they are each other's inverse, bit for bit.

    Neither may change dtype or device, or write into its arguments, and both work on tensors of
    device "meta", which is how shapes are computed without any data.
    """

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """Our parameter, from the Hugging Face weights of an entry, in the entry's order."""

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The Hugging Face weights of an entry, from our parameter."""


@dataclass(frozen=True)
class Same:
    """One weight that is the same in both formats."""

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the weight."""
        (tensor,) = parts
        return tensor

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """Return the weight."""
        return [tensor]


@dataclass(frozen=True)
class Transposed:
    """One matrix that Hugging Face's format holds with its axes exchanged."""

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[I, O] -> [O, I]."""
        (tensor,) = parts
        return tensor.transpose(0, 1)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[O, I] -> [I, O]."""
        return [tensor.transpose(0, 1)]


@dataclass(frozen=True)
class Concatenated:
    """``parts`` weights of equal shape, one after the other along dimension 0 (gate and up)."""

    parts: int = 2

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[O, ...] each -> [parts * O, ...]."""
        return torch.cat(list(parts))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[parts * O, ...] -> [O, ...] each."""
        return list(tensor.chunk(self.parts))


@dataclass(frozen=True, kw_only=True)
class FusedQKV:
    """Projections of queries, keys and values, fused as Megatron lays them out.

    Megatron orders the output features group by group: the queries that share a key, this key,
    its value.

    Attributes:
        heads: query heads.
        groups: key-value heads; equal to ``heads`` without grouped queries.
        head_size: features of a head.
        missing: those of "q", "k", "v" that Hugging Face's format does not have (Whisper's keys
            have no bias): zero in ours, left out of theirs.
        gated: the weight of the queries holds gates too, which Hugging Face puts behind each head,
            Megatron behind the queries of a group.
    """

    heads: int
    groups: int
    head_size: int
    missing: tuple[str, ...] = ()
    gated: bool = False

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """Weights [O, I] or biases [O] of q, k, v -> [O_q + O_k + O_v, I] or [O_q + O_k + O_v]."""
        given = iter(parts)
        some = parts[0]
        grouped = []
        for name, features in zip("qkv", self._features(), strict=True):
            shape = (self.groups, features, *some.shape[1:])
            part = some.new_zeros(shape) if name in self.missing else next(given).reshape(shape)
            grouped.append(self._exchanged(part, name, 2))
        return torch.cat(grouped, dim=1).reshape(-1, *some.shape[1:])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The inverse."""
        grouped = tensor.reshape(self.groups, sum(self._features()), *tensor.shape[1:])
        split = grouped.split(self._features(), dim=1)
        return [
            self._exchanged(part, name, 1).reshape(-1, *tensor.shape[1:])
            for name, part in zip("qkv", split, strict=True)
            if name not in self.missing
        ]

    def _features(self) -> list[int]:
        """Features of the queries (and gates), the key and the value of one group."""
        queries = self.heads // self.groups * self.head_size * (2 if self.gated else 1)
        return [queries, self.head_size, self.head_size]

    def _exchanged(self, grouped: Tensor, name: str, kind: int) -> Tensor:
        """Queries and gates [groups, features, ...] from one order to the other.

        ``kind`` is the axis that queries and gates are told apart by: 2, head by head, or 1.
        """
        if not self.gated or name != "q":
            return grouped
        heads = self.heads // self.groups
        sizes = [heads, heads]
        sizes[kind - 1] = 2
        parted = grouped.reshape(self.groups, *sizes, self.head_size, *grouped.shape[2:])
        return parted.transpose(1, 2).reshape(grouped.shape)


@dataclass(frozen=True, kw_only=True)
class JoinedQKV:
    """One weight with all queries, then all keys, then all values, as Megatron fuses them.

    Attributes:
        heads: as many for queries as for keys.
        head_size: features of a head.
    """

    heads: int
    head_size: int

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[3 * heads * head_size, ...], part by part -> head by head."""
        (tensor,) = parts
        return self._fused.to_mimo(tensor.chunk(3))

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The inverse."""
        return [torch.cat(self._fused.to_hf(tensor))]

    @property
    def _fused(self) -> FusedQKV:
        return FusedQKV(heads=self.heads, groups=self.heads, head_size=self.head_size)


@dataclass(frozen=True)
class PaddedVocabulary:
    """An embedding or output layer whose rows Megatron pads to a multiple.

    Attributes:
        rows: of Hugging Face's weight.
        padded_rows: of ours; None for no padding.
    """

    rows: int
    padded_rows: int | None = None

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, H] -> [padded_rows, H], zero below."""
        (weight_VH,) = parts
        missing = (self.padded_rows or self.rows) - self.rows
        if missing <= 0:
            return weight_VH
        return torch.cat([weight_VH, weight_VH.new_zeros(missing, *weight_VH.shape[1:])])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """[padded_rows, H] -> [rows, H]."""
        return [tensor[: self.rows]]


@dataclass(frozen=True)
class Reshaped:
    """One weight whose shape differs, in the same memory order (a patch convolution as a linear).

    Attributes:
        mimo_shape: ours.
        hf_shape: Hugging Face's.
    """

    mimo_shape: tuple[int, ...]
    hf_shape: tuple[int, ...]

    def to_mimo(self, parts: Sequence[Tensor]) -> Tensor:
        """``hf_shape`` -> ``mimo_shape``."""
        (tensor,) = parts
        return tensor.reshape(self.mimo_shape)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """``mimo_shape`` -> ``hf_shape``."""
        return [tensor.reshape(self.hf_shape)]


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """One parameter of ours, or one per layer, or one per layer and expert.

    Attributes:
        mimo: name in ``MimoModel.state_dict()`` of a model whose layers are megatron-core's local
            ones; ``{i}`` is the layer's number, counted over the whole model, ``{e}`` the expert's.
        hf: names that Hugging Face's transformers writes; ``{i}`` and ``{e}`` are the same numbers.
            ``name[{e}]`` is one expert's part of a weight that holds all experts of a layer, along
            its first axis.
        transform: how the weights become the parameter.
        layers: the layers there are, for names with ``{i}``.
        experts: the experts there are, for names with ``{e}``.
        shape: of a part in square brackets, by which files with and without exchanged axes are told
            apart.
        others: all ways in which files hold the parameter, this one among them, where there are
            several; of two that fit, the first is right.
    """

    mimo: str
    hf: tuple[str, ...]
    transform: Transform = Same()
    layers: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    shape: tuple[int, ...] | None = None
    others: tuple[KeyEntry, ...] = ()

    def __post_init__(self) -> None:
        for mark, title, given in (
            ("{i}", "layers", self.layers),
            ("{e}", "experts", self.experts),
        ):
            numbered = {mark in name for name in (self.mimo, *self.hf)}
            if numbered != {given is not None}:
                raise ConfigError(
                    f"entry {self.mimo!r} <-> {list(self.hf)}, {title}={given}: expected {mark!r} "
                    f"in all of its names with {title}, in none without"
                )

    def each(self) -> Iterator[KeyEntry]:
        """The entry of every layer and expert, without ``{i}`` and ``{e}``."""
        if self.layers is None and self.experts is None:
            yield self
            return
        for layer in (None,) if self.layers is None else self.layers:
            for expert in (None,) if self.experts is None else self.experts:
                names = [
                    name.replace("{i}", str(layer)).replace("{e}", str(expert))
                    for name in (self.mimo, *self.hf)
                ]
                yield KeyEntry(mimo=names[0], hf=tuple(names[1:]), transform=self.transform)

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether files with weights of these canonical names hold the parameter in this way."""
        names = [name.partition("[")[0] for name in next(self.each()).hf]
        return all(
            name in shapes and (self.shape is None or shapes[name][1:] == self.shape)
            for name in names
        )


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """All entries of a model.

    Attributes:
        entries: every parameter of ours stands in one, every Hugging Face weight in at most one.
        carried: patterns (``*`` for anything) of Hugging Face weights that our model does not
            have; conversion keeps them aside and gives them back.
        aliases: (spelling, spelling in ``entries``) of prefixes: older files name weights
            otherwise. Those that follow are tried on the result of those before.
        tied: (name, name in ``entries``) of weights that are one; files may hold either or both.
    """

    entries: tuple[KeyEntry, ...]
    carried: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for title, names in (
            ("parameter", [entry.mimo for entry in self.each()]),
            ("Hugging Face weight", [name for entry in self.each() for name in entry.hf]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ConfigError(f"{title} {twice[0]!r} stands in two entries; expected one")

    def each(self) -> Iterator[KeyEntry]:
        """All entries, one per layer."""
        for entry in self.entries:
            yield from entry.each()

    def canonical(self, name: str) -> str:
        """A Hugging Face weight's name as ``entries`` have it, from any known spelling."""
        for spelling, canonical in self.aliases:
            if name.startswith(spelling):
                name = canonical + name.removeprefix(spelling)
        return name

    def fitting(self, shapes: Mapping[str, Sequence[int]]) -> KeyTable:
        """The table of files with weights of these names, in any spelling, and shapes.

        It differs where a parameter may be held in several ways; where none of them fits, the
        family's own stays.
        """
        found = {self.canonical(name): tuple(shape) for name, shape in shapes.items()}
        entries = (
            next((one for one in entry.others if one.fits(found)), entry) for entry in self.entries
        )
        return replace(self, entries=tuple(entries))

    @functools.cached_property
    def stacked(self) -> frozenset[str]:
        """Canonical names of weights that hold all experts of a layer."""
        names = (name for entry in self.each() for name in entry.hf)
        return frozenset(name.partition("[")[0] for name in names if name.endswith("]"))

    def laid_out(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], KeyTable]:
        """Tensors by the names of entries, and the table that has these entries.

        Args:
            tensors: by name in any spelling, such as weights or gradients of a model; those of
                several experts are split into views.
        """
        table = self.fitting({name: tensor.shape for name, tensor in tensors.items()})
        split: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if self.canonical(name) in table.stacked:
                split |= {f"{name}[{expert}]": part for expert, part in enumerate(tensor)}
            else:
                split[name] = tensor
        return split, table

    def is_carried(self, name: str) -> bool:
        """Whether our model does without the weight of this canonical name."""
        return any(fnmatchcase(name, pattern) for pattern in self.carried)

    def hf_shapes(self, entry: KeyEntry, mimo_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of an entry's Hugging Face weights, given that of our parameter.

        Raises:
            InputError: the transform cannot have made a parameter of this shape.
        """
        try:
            parts = entry.transform.to_hf(torch.empty(tuple(mimo_shape), device="meta"))
        except RuntimeError as error:
            raise InputError(
                f"{entry.mimo} of shape {list(mimo_shape)} does not fit {entry.transform}: {error}"
            ) from error
        return {name: tuple(part.shape) for name, part in zip(entry.hf, parts, strict=True)}
