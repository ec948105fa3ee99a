"""The costs of training a model, summed over the ranks that hold its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron.core.models.mimo.errors import UnsupportedError
from megatron.core.utils import unwrap_model
from megatron.mimo.models.common.flops import Costs, modality_costs, training_costs
from megatron.mimo.topology import LANGUAGE

if TYPE_CHECKING:
    from torch import nn

    from megatron.core.models.mimo import MimoModel

__all__ = ["encoders_are_apart", "model_costs"]

_Part = tuple[str, int]  # module, and its place in the order of the data


def encoders_are_apart(chunks: Sequence[MimoModel]) -> bool:
    """Whether encoders are on ranks of their own."""
    return any(chunk.disjoint_rows is not None for chunk in chunks)


def model_costs(chunks: Sequence[MimoModel]) -> Mapping[str, float] | None:
    """Amount -> operations for one of it, of the whole model.

    Collective over the pipeline; over the job where encoders are on ranks of their own. None where
    a part of the model does not say what it does.

    Args:
        chunks: this rank's.
    """
    from megatron.core import mpu

    group = None if encoders_are_apart(chunks) else mpu.get_pipeline_model_parallel_group()
    stage = mpu.get_pipeline_model_parallel_rank()
    stages = mpu.get_pipeline_model_parallel_world_size()
    parts: dict[_Part, tuple[nn.Module, Callable[[bool], Costs]]] = {}
    for number, chunk in enumerate(chunks):
        if chunk.language_model is not None:
            parts[LANGUAGE, number * stages + stage] = chunk, _costs_of(chunk)
        for name, submodules in chunk.modality_submodules.items() if group is None else ():
            at = unwrap_model(submodules).pg_collection.pp.rank()
            parts[name, at] = submodules, _costs_of_modality(name, submodules)
    trained: dict[_Part, bool] = {}
    own = {part: _is_trained(module) for part, (module, _) in parts.items()}
    for flags in _gathered(own, group):
        trained |= flags
    costs: dict[_Part, Costs | None] = {}
    for part, (_, cost) in parts.items():
        costs[part] = _known(cost, any(trained[one] for one in trained if _is_before(one, part)))
    found: dict[_Part, Costs | None] = {}
    for known in _gathered(costs, group):
        found |= known
    total: Counter[str] = Counter()
    for one in found.values():
        if one is None:
            return None
        total.update(one)
    return total


def _is_before(one: _Part, part: _Part) -> bool:
    """Whether data pass one part before another: encoders come before the language model."""
    if one[0] == part[0]:
        return one[1] < part[1]
    return part[0] == LANGUAGE


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _costs_of(chunk: MimoModel) -> Callable[[bool], Costs]:
    return lambda before: training_costs(chunk, trained_before=before)


def _costs_of_modality(name: str, submodules: nn.Module) -> Callable[[bool], Costs]:
    return lambda before: modality_costs(name, submodules, trained_before=before)


def _known(cost: Callable[[bool], Costs], before: bool) -> Costs | None:
    try:
        return cost(before)
    except UnsupportedError:
        return None


def _gathered[Value](
    own: dict[_Part, Value], group: dist.ProcessGroup | None
) -> list[dict[_Part, Value]]:
    everyone: list[dict[_Part, Value]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, own, group=group)
    return everyone
