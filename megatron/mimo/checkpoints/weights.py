"""Weights -> this rank's part of a built model: Hugging Face's in memory, or a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.mimo.errors import ConfigError, InputError
from megatron.mimo.checkpoints.inspection import problem
from megatron.mimo.checkpoints.match import check_shapes, match_names
from megatron.mimo.checkpoints.slots import STATE_METADATA, Slot, match_slots, model_slots
from megatron.mimo.models.common.keys import KeyEntry, KeyTable

_NOT_THIS_MODEL = (CheckpointingException, CheckpointException, KeyError)
_DAMAGED = (UnpicklingError, EOFError, ValueError, TypeError)

__all__ = ["load_hugging_face", "load_weights", "make_parameter"]


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
    tensors, table = table.laid_out(tensors)
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


def make_parameter(row: KeyEntry, parts: Mapping[str, Tensor]) -> Tensor:
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


def load_weights(model: Any, checkpoint: Path) -> None:
    """Fill a built ``MimoModel`` with the weights of a checkpoint, imported or trained.

    Every rank of the model's groups takes part; the layout may differ from the one that saved.
    Hashes are not compared here: ``checkpoint.locate`` does that.

    Args:
        model: without wrappers.
        checkpoint: ``iter_...`` or ``release`` folder.

    Raises:
        ConfigError: the checkpoint is not complete.
        InputError: it does not hold this model.
    """
    trouble = problem(checkpoint)
    if trouble is not None:
        raise ConfigError(f"checkpoint {checkpoint} cannot be used: {trouble}")
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        saved = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
        metadata = {**STATE_METADATA, **saved, "dp_cp_group": data_parallel}
        state = dist_checkpointing.load(
            model.sharded_state_dict(metadata=metadata),
            str(checkpoint),
            strict="assume_ok_unexpected",
        )
    except (*_NOT_THIS_MODEL, *_DAMAGED) as error:
        reason = next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)
        raise InputError(f"{checkpoint} does not hold this model: {reason}") from error
    names = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in names})
