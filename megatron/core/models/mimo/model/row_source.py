"""Where the rows of a micro-batch come from, and what ranks of encoders alone send on.

Legend: N rows of one modality, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron.core.models.mimo.alignment import AlignmentPlan, EncodedRows
from megatron.core.models.mimo.model.batch.checks import (
    check_count,
    check_encoder_order,
    refuse_other_ids,
)
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
from megatron.core.models.mimo.model.encoding.encode import Rows
from megatron.core.models.mimo.model.grids.bridges import bridge_rows
from megatron.core.models.mimo.model.grids.refusals import refuse_encoding_alone

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel


def rows_to_merge(model: MimoModel, inputs: ForwardInputs, plan: AlignmentPlan) -> Rows:
    """The rows [N, H] of every modality that the language model's first stage merges with text.

    They are given (``encoded_rows``), have arrived from encoders on other ranks, or are encoded
    here; where encoders have process grids of their own on these ranks, all ranks then take part.

    Raises:
        InputError: rows that the plan does not count on, or a plan of other token ids.
        UnsupportedError: encoders that cannot run within a forward of this model.
    """
    check_encoder_order(plan.encoders, model.modality_submodules)
    if inputs.encoded_rows is not None:
        rows = dict(inputs.encoded_rows)
    else:
        refuse_encoding_alone(model.mimo_config)
        apart = model.disjoint_rows is not None
        rows = _arrived(model, inputs) if apart else _encoded_here(model, inputs, plan)
    given = {name: EncodedRows.of(encoded).num_rows for name, encoded in rows.items()}
    for name in {**plan.counts, **given}:
        check_count(name, plan.counts.get(name, 0), given.get(name, 0))
    if inputs.plan is not None and inputs.input_ids_BS is not None:
        refuse_other_ids(inputs.plan, inputs.input_ids_BS, model.special_token_ids)
    return rows


def rows_to_send(model: MimoModel, inputs: ForwardInputs) -> dict[str, torch.Tensor]:
    """What a rank of encoders alone gives: modality -> rows, or hidden states between stages."""
    assert model.disjoint_rows is not None, "the language model is on ranks of its own"
    arrived = _from_other_ranks(model)
    before: Rows | None = None if arrived is None else {**arrived}
    rows = model._forward_encoders(inputs.input_ids_BS, inputs.modality_inputs, before)
    model.forget_input_tensor()
    return model.disjoint_rows.outgoing(
        rows, model.modality_submodules, arrived, inputs.input_ids_BS
    )


def _encoded_here(model: MimoModel, inputs: ForwardInputs, plan: AlignmentPlan) -> Rows:
    """Rows of this rank's encoders, taken to the language model's layout where it is another."""
    rows = model._forward_encoders(inputs.input_ids_BS, inputs.modality_inputs, None)
    if not model.colocated_comms:
        return rows
    device, config = next(model.parameters()).device, model.config
    empty_H = torch.empty(config.hidden_size, dtype=config.params_dtype, device=device)
    bridges, submodules = model.colocated_comms, model.modality_submodules
    return bridge_rows(rows, bridges, submodules, plan, empty_H=empty_H)


def _arrived(model: MimoModel, inputs: ForwardInputs) -> Rows:
    """Rows of encoders on other ranks; context-parallel ranks share their gradients."""
    assert model.disjoint_rows is not None, "encoders are on ranks of their own"
    adapter = model.partition_adapter
    cp_group = adapter.cfg.cp_group if adapter is not None and adapter.cfg.use_cp else None
    return model.disjoint_rows.incoming(_from_other_ranks(model), inputs.input_ids_BS, cp_group)


def _from_other_ranks(model: MimoModel) -> dict[str, torch.Tensor] | None:
    """What encoders on other ranks have sent: modality -> rows, or hidden states of a stage."""
    arrived = model.input_tensors
    if not isinstance(arrived, dict):
        return None
    known = model.mimo_config.modality_submodules_spec
    return {name: value for name, value in arrived.items() if name in known}
