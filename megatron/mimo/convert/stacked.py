"""Weights that hold all experts of a layer, as one weight for each expert: ``name[expert]``.

The parts lie one behind the other in a file, so that each can be read and written by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron.mimo.convert.weights import Weight, WeightSource, part_of
from megatron.mimo.models.common.keys import KeyTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Unstacked", "join", "parts_of", "unstacked"]


class Unstacked:
    """A source in which each expert's part is a weight of its own.

    Attributes:
        by_name: every weight, and instead of those that hold several experts, their parts.
    """

    def __init__(self, source: WeightSource, table: KeyTable) -> None:
        self._source = source
        self.by_name: Mapping[str, Weight] = {
            part.name: part
            for weight in source.by_name.values()
            for part in parts_of(weight, table)
        }

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        whole, index = part_of(name)
        if index is None or name in self._source.by_name:
            return self._source.read(name)
        return self._source.read_part(whole, index)

    def read_part(self, name: str, index: int) -> Tensor:
        """One part along the first axis of a tensor."""
        return self._source.read_part(name, index)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of some weights."""
        return sum(self.by_name[name].size for name in names)


def unstacked(source: WeightSource, table: KeyTable) -> tuple[WeightSource, KeyTable]:
    """A source as a table's entries name its weights, and the table that has these entries.

    Args:
        source: weights as the files hold them.
        table: of the model's family.
    """
    shapes = {name: weight.shape for name, weight in source.by_name.items()}
    fitted = table.fitting(shapes)
    return (Unstacked(source, fitted) if fitted.stacked else source), fitted


def parts_of(weight: Weight, table: KeyTable) -> Iterator[Weight]:
    """The parts of a weight that holds all experts of a layer; another weight itself."""
    if table.canonical(weight.name) not in table.stacked:
        yield weight
        return
    count = weight.shape[0]
    size = weight.size // count
    for index in range(count):
        yield replace(
            weight,
            name=f"{weight.name}[{index}]",
            shape=weight.shape[1:],
            start=weight.start + index * size,
            size=size,
        )


def join(
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of weights in files, from those with parts that are named one by one."""
    joined: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in kinds.items():
        whole, index = part_of(name)
        if index is None:
            joined[name] = dtype, shape
        else:
            count = joined[whole][1][0] if whole in joined else 0
            joined[whole] = dtype, (max(count, index + 1), *shape)
    return joined
