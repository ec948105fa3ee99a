"""Whole parameters and the parts of them that ranks hold, found by checkpoint metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank holds of a whole parameter."""

    name: str
    parameter: torch.nn.Parameter
    key: str
    shape: tuple[int, ...]
    where: tuple[slice, ...]

    def of(self, whole: Tensors) -> torch.Tensor:
        return whole[self.key][self.where]

    def error(self, value: torch.Tensor, whole: Tensors) -> float:
        """Norm of the difference, relative to the norm of the whole parameter's tensor."""
        difference = (value - self.of(whole)).norm()
        scale = whole[self.key].norm()
        if not scale:  # what is zero has to stay zero
            return float(difference)
        return (difference / scale).item()

    def span(self) -> tuple[int, ...]:
        """First index in each dimension, and the number of elements."""
        return (*(index.start for index in self.where), self.parameter.numel())


def parts(model: Any) -> Iterator[Part]:
    sharded = model.sharded_state_dict()
    for name, parameter in model.named_parameters():
        entry = sharded[name]
        assert entry.data is not None
        assert entry.data.shape == parameter.shape
        layers = entry.prepend_axis_num  # a checkpoint stacks a parameter's layers, and experts
        yield Part(
            name=name,
            parameter=parameter,
            key=f"{entry.key}{[*entry.global_offset[:layers]]}",
            shape=entry.global_shape[layers:],
            where=entry.global_slice()[layers:],
        )


def whole(model: Any, of: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Tensors:
    """What ``of`` gives for each parameter of a model that runs on one process."""
    tensors = {}
    for part in parts(model):
        value = of(part.parameter)
        if value is not None:
            assert value.shape == part.shape, "the reference runs on one process"
            tensors[part.key] = value.clone()
    return tensors
