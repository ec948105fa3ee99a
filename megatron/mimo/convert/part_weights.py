"""The weights of a model of parts, as if they stood in one directory.

Legend: V vocabulary, H hidden.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.mimo.convert.weights import Weight, Weights
from megatron.mimo.models.common.assembly import LANGUAGE, Part

__all__ = ["Growth", "PartWeights", "grow_vocabulary"]

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What becomes of the language model's vocabulary.

    Attributes:
        old_rows: that its configuration says.
        rows: that the whole has.
        tokens: ids that mean something new; their rows are made whether there were such or not.
    """

    old_rows: int
    rows: int
    tokens: tuple[int, ...]


class PartWeights:
    """Weights of several directories under the names that they have in the whole.

    Args:
        parts: by name, what is taken from each.
        weights: by name, of each directory.
        growth: of the vocabulary.

    Attributes:
        by_name: every weight of the whole that there is; shapes are those of the whole.
    """

    def __init__(
        self, parts: Mapping[str, Part], weights: Mapping[str, Weights], growth: Growth
    ) -> None:
        self._growth = growth
        self._origins: dict[str, tuple[Weights, str]] = {}
        self._fresh_std = 0.0
        self.by_name: dict[str, Weight] = {}
        for part, files in weights.items():
            for name, weight in files.by_name.items():
                whole = parts[part].name_in_whole(name)
                if whole is None:
                    continue
                self._origins[whole] = (files, name)
                shape = self._shape(weight) if part == LANGUAGE else weight.shape
                self.by_name[whole] = replace(
                    weight,
                    name=whole,
                    file=f"{part}/{weight.file}",
                    shape=shape,
                    size=weight.dtype.itemsize * torch.Size(shape).numel(),
                )

    def make(
        self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, std: float
    ) -> None:
        """Add weights that no part has: biases zero, all else normal, equal at every call.

        Args:
            shapes: by name in the whole.
            dtype: of all of them.
            std: standard deviation.
        """
        self._fresh_std = std
        for name, shape in shapes.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            self.by_name[name] = Weight(
                name=name, file="", dtype=dtype, shape=shape, start=0, size=size
            )

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        weight = self.by_name[name]
        if name not in self._origins:
            return _fresh(weight, self._fresh_std)
        files, original = self._origins[name]
        tensor = files.read(original)
        if self._is_vocabulary(files.by_name[original]) and name.startswith("language_model."):
            return grow_vocabulary(tensor, self._growth.rows, self._growth.tokens)
        return tensor

    def read_part(self, name: str, index: int) -> Tensor:
        """One part along the first axis of a tensor, in memory of its own."""
        files, original = self._origins[name]
        return files.read_part(original, index)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some weights."""
        return sum(self.by_name[name].size for name in names)

    def _shape(self, weight: Weight) -> tuple[int, ...]:
        if not self._is_vocabulary(weight):
            return weight.shape
        return (self._growth.rows, *weight.shape[1:])

    def _is_vocabulary(self, weight: Weight) -> bool:
        """Whether it has a row for each token; one of a wrong size is left for others to refuse."""
        return weight.name.endswith(_VOCABULARY) and weight.shape[0] == self._growth.old_rows


def grow_vocabulary(weight_VH: Tensor, rows: int, tokens: Iterable[int]) -> Tensor:
    """An embedding or output layer with other rows.

    Args:
        weight_VH: the old one.
        rows: of the new one, at least as many.
        tokens: ids whose rows are new, whether there were such or not.

    Returns:
        [rows, H]: new rows are the mean of the old ones, computed in fp64.
    """
    old, width = weight_VH.shape
    is_new = torch.ones(rows, dtype=torch.bool)
    is_new[:old] = False
    is_new[list(tokens)] = True
    if not bool(is_new.any()):
        return weight_VH
    total_H = weight_VH.new_zeros(width, dtype=torch.float64)
    for start in range(0, old, _ROWS_AT_ONCE):
        some_VH = weight_VH[start : start + _ROWS_AT_ONCE]
        total_H += some_VH[~is_new[start : start + len(some_VH)]].double().sum(dim=0)
    grown_VH = weight_VH.new_empty(rows, width)
    grown_VH[:old] = weight_VH
    grown_VH[is_new] = (total_H / (~is_new).sum()).to(weight_VH.dtype)
    return grown_VH


def _fresh(weight: Weight, std: float) -> Tensor:
    if weight.name.endswith(".bias"):
        return torch.zeros(weight.shape, dtype=weight.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(weight.name.encode()))
    return (torch.randn(weight.shape, generator=generator) * std).to(weight.dtype)
