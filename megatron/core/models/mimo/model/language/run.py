"""Running the language model of one micro-batch, on whatever pipeline stage this rank has.

Legend: S sequence, B micro-batch, H hidden, M vectors of a message between stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron.core.models.mimo.alignment import AlignmentPlan
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
from megatron.core.models.mimo.model.batch.labels import zero_without_label
from megatron.core.models.mimo.model.encoding.encode import Rows
from megatron.core.models.mimo.model.language.call import share_of_labels
from megatron.core.models.mimo.model.language.decoder_input import (
    arrived_from_stage_before,
    merged_with_text,
)
from megatron.core.models.mimo.model.language.expert_balance import EXPERT_BALANCE
from megatron.core.models.mimo.partition.utils import sequence_cut
from megatron.core.models.mimo.ranges import named_range

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel

ModelOutput = tuple[Any, torch.Tensor | None]


def run_language_model(
    model: MimoModel, inputs: ForwardInputs, rows: Rows, plan: AlignmentPlan | None
) -> ModelOutput:
    """Merge rows with text on the first stage, and run this stage's layers.

    Args:
        model: a model with a part of its language model on this rank.
        inputs: inputs of the micro-batch, uncut.
        rows: modality -> rows, on the first stage.
        plan: where rows go, on the first stage; None on others.

    Returns:
        What ``MimoModel.forward`` does.
    """
    adapter, call = model.partition_adapter, model.language_call
    assert call is not None, "the language model is on this rank"
    call.check_masks(inputs, context_parallel=adapter is not None and adapter.cfg.use_cp)
    device = next(model.parameters()).device
    packed = call.packed_row(inputs, config=model.config, device=device)
    cut = sequence_cut(adapter, packed)
    tally = None if model.expert_balance is None else model.expert_balance.begin(inputs, cut)
    if plan is None:
        read = arrived_from_stage_before(model, inputs, cut=cut, tally=tally)
    else:
        with named_range("merge"):
            read = merged_with_text(model, inputs, rows, plan, cut=cut, packed=packed)
    labels = share_of_labels(inputs, cut, model.language_model)
    arguments = call.arguments(
        model.language_model,
        inputs,
        labels,
        decoder_input=None if plan is None else read.hidden_SBH,
        level_rows=model.level_route.added(read.levels),
        cut=cut,
        packed=packed,
        padding_BS=None if tally is None else tally.padding_BS,
    )
    with model.heads.reading(model.language_model) as hidden:
        output = model.language_model(**arguments)
    model.forget_input_tensor()
    counted = None
    if tally is not None:
        output, counted = tally.joined(output)
    # Between stages: [M, 1, H], the hidden states, then what else later stages need.
    if model.level_route.leaves:
        output = model.level_route.message(output, read.levels)
    if counted is not None and counted.leaves:
        return counted.message(output), labels.loss_mask_BS
    output = zero_without_label(output, labels.without_label_BS)
    if (hidden or counted is not None) and labels.labels_BS is not None:
        output = model.heads.losses(
            hidden[0] if hidden else None,
            output,
            labels,
            inputs.head_targets,
            cut=cut,
            tp_group=None if adapter is None else adapter.cfg.tp_group,
        )
        if counted is not None:
            output[EXPERT_BALANCE] = counted.loss(adapter)
    return output, labels.loss_mask_BS
