"""Units of a modality's inputs, which any rank may encode, and the calls that encode them.

A unit is an item (image, clip) where the modality's one encoder says what its items are
(``rows_per_item``) and a row of the projection comes from one row of the encoder; else the inputs
of a whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.comm.encoder_split import cut_inputs, rows_of_items
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.utils import unwrap_model

Inputs = Mapping[str, Mapping[str, Any]]  # encoder -> arguments
# A modality that overrides one of these may mix items.
_METHODS = ("forward", "encode", "combine_embeddings", "project_embeddings")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is encoded as a whole: an item, or the inputs of a micro-batch.

    Attributes:
        batch: number of the inputs that it is part of.
        item: number of the item among them; None for all of them.
        rows: how many it gives.
        cost: what encoding it costs, relative to other units of the modality.
    """

    batch: int
    item: int | None
    rows: int
    cost: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of the modality's module.

    Attributes:
        inputs: what it is called with.
        rows: how many it has to give.
    """

    inputs: Inputs
    rows: int


def units_of(submodule: nn.Module, batch: int, inputs: Inputs, rows: int) -> list[Unit]:
    """The units of one micro-batch's inputs that give rows, in the order of their rows.

    Args:
        submodule: the modality's, maybe wrapped.
        batch: number of the inputs.
        inputs: inputs of all encoders of the modality.
        rows: for how many the micro-batch has places.
    """
    own: Any = unwrap_model(submodule)
    whole = [Unit(batch=batch, item=None, rows=rows, cost=float(rows))]
    if not isinstance(own, ModalitySubmodules) or len(own.encoders) != 1 or len(inputs) != 1:
        return whole
    if any(getattr(type(own), name) is not getattr(ModalitySubmodules, name) for name in _METHODS):
        return whole
    ((name, encoder),) = own.encoders.items()
    if name not in inputs or not hasattr(unwrap_model(encoder), "rows_per_item"):
        return whole
    counts = rows_of_items(name, encoder, inputs[name])
    if sum(counts) != rows:  # the projection changes their number; or an error, found in the call
        return whole
    costs = counts
    if hasattr(unwrap_model(encoder), "cost_per_item"):
        costs = list(unwrap_model(encoder).cost_per_item(**inputs[name]))
    return [
        Unit(batch=batch, item=item, rows=count, cost=float(cost))
        for item, (count, cost) in enumerate(zip(counts, costs, strict=True))
        if count
    ]


def calls_of(units: Sequence[Unit], inputs: Mapping[int, Inputs], *, most_rows: int) -> list[Call]:
    """Calls that encode units in order, as few as ``most_rows`` for each allow.

    Inputs of several micro-batches are joined where their shapes allow it.

    Args:
        units: units of one modality, in the order in which their rows are wanted.
        inputs: number -> inputs, of every micro-batch that has units.
        most_rows: how many rows a call may give, unless it encodes one unit.
    """
    calls: list[Call] = []
    for group in _by_batch(units, most_rows):
        call = Call(inputs=part_of(group, inputs[group[0].batch]), rows=sum(u.rows for u in group))
        joined = None
        if calls and group[0].item is not None and calls[-1].rows + call.rows <= most_rows:
            joined = _joined(calls[-1].inputs, call.inputs)
        if joined is None:
            calls.append(call)
        else:
            calls[-1] = Call(inputs=joined, rows=calls[-1].rows + call.rows)
    return calls


def _by_batch(units: Sequence[Unit], most_rows: int) -> list[list[Unit]]:
    groups: list[list[Unit]] = []
    for unit in units:
        last = groups[-1] if groups else []
        fits = sum(one.rows for one in last) + unit.rows <= most_rows
        if last and last[-1].batch == unit.batch and fits:
            last.append(unit)
        else:
            groups.append([unit])
    return groups


def part_of(units: Sequence[Unit], inputs: Inputs) -> Inputs:
    """The inputs of some units of one micro-batch, item by item.

    Args:
        units: units of the micro-batch, in the order of their rows.
        inputs: inputs of the micro-batch.
    """
    if units[0].item is None:
        return inputs
    ((name, arguments),) = inputs.items()
    chosen = [unit.item for unit in units if unit.item is not None]
    total = len(next(value for value in arguments.values() if _has_items(value)))
    if chosen == [*range(chosen[0], chosen[-1] + 1)]:
        return {name: cut_inputs(name, arguments, total, chosen[0], chosen[-1] + 1)}
    cut_inputs(name, arguments, total, 0, total)  # every argument has one entry for each item
    return {name: {key: _pick(value, chosen) for key, value in arguments.items()}}


def renumbered(units: Sequence[Unit]) -> list[Unit]:
    """The units of a micro-batch as they are among the inputs of ``part_of``."""
    return [replace(u, item=None if u.item is None else n) for n, u in enumerate(units)]


def _has_items(value: Any) -> bool:
    return isinstance(value, list | tuple) or (torch.is_tensor(value) and value.dim() > 0)


def _pick(value: Any, chosen: Sequence[int]) -> Any:
    if torch.is_tensor(value) and value.dim():
        return value.index_select(0, torch.tensor(chosen, device=value.device))
    return [value[item] for item in chosen] if _has_items(value) else value


def _joined(first: Inputs, second: Inputs) -> Inputs | None:
    """Both inputs as one; None where their shapes or other arguments differ."""
    if [*first] != [*second] or any(first[name].keys() != second[name].keys() for name in first):
        return None
    joined: dict[str, dict[str, Any]] = {}
    for name, arguments in first.items():
        joined[name] = {}
        for key, one in arguments.items():
            other = second[name][key]
            if torch.is_tensor(one) and one.dim():
                if not torch.is_tensor(other) or one.shape[1:] != other.shape[1:]:
                    return None
                joined[name][key] = torch.cat([one, other])
            elif _has_items(one):
                joined[name][key] = [*one, *other]
            elif torch.is_tensor(one) or one != other:
                return None
            else:
                joined[name][key] = one
    return joined
