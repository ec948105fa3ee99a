"""Hugging Face weights in memory -> this rank's part of a built model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.convert.keys import KeyTable, Row
from megatron.mimo.convert.match import check_shapes, match_names
from megatron.mimo.convert.slots import Slot, match_slots, model_slots

__all__ = ["load_hugging_face", "make_parameter"]


@torch.no_grad()
def load_hugging_face(model: Any, tensors: Mapping[str, Tensor], table: KeyTable) -> None:
    """Fill a built ``MimoModel`` with weights, under any tensor- and pipeline-parallel layout.

    No communication: every rank passes all weights and takes its part.

    Args:
        model: without wrappers.
        tensors: ``state_dict()`` of the Hugging Face model, whole, on any device, of any dtype
            (the model keeps its own).
        table: of the model's family.

    Raises:
        InputError: weights are missing, unexpected or of a wrong shape.
        ConfigError: the table does not name a parameter of the model.
    """
    match = match_names(tensors.keys(), table, source="the state dict")
    for slot, row in match_slots(model_slots(model), table):
        parts = {name: tensors[match.given[name]] for name in row.hf}
        expected = table.hf_shapes(row, slot.shape)
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        check_shapes(expected, shapes, source="the state dict")
        whole = _padded(make_parameter(row, parts), slot)
        for piece in slot.pieces():
            assert piece.data is not None
            piece.data.copy_(whole[piece.global_slice()[piece.prepend_axis_num :]])


def make_parameter(row: Row, parts: Mapping[str, Tensor]) -> Tensor:
    """A row's parameter, whole, from its Hugging Face weights by canonical name.

    Raises:
        InputError: the weights do not have one dtype.
    """
    ordered = [parts[name] for name in row.hf]
    dtypes = {part.dtype for part in ordered}
    if len(dtypes) > 1:
        raise InputError(
            f"{', '.join(row.hf)} have the dtypes {', '.join(sorted(map(str, dtypes)))}; they are "
            f"one parameter, {row.mimo}, of one dtype: save the model in one dtype"
        )
    return row.transform.to_mimo(ordered)


def _padded(whole: Tensor, slot: Slot) -> Tensor:
    missing = slot.shape[0] - whole.shape[0] if slot.may_be_padded else 0
    if missing <= 0:
        return whole
    return torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
