"""What the decoder layers of a pipeline stage read.

On the first stage, text and modality rows together; on later ones, what the stage before has sent.
Legend: S sequence, B micro-batch, H hidden, N rows of one stream; ``S_local`` after
context/sequence sharding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.mimo.alignment import AlignmentPlan, EncodedRows
from megatron.core.models.mimo.alignment.cut import SequenceCut
from megatron.core.models.mimo.config import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import refuse_levels_without_plan
from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs, plan_of
from megatron.core.models.mimo.model.encoding.encode import Rows
from megatron.core.models.mimo.model.encoding.idle import take_part
from megatron.core.models.mimo.model.language.expert_balance import Tally
from megatron.core.models.mimo.model.language.refusals import refuse_scattering_embedding
from megatron.core.models.mimo.model.merging.levels import LevelRows, MergedSequence, place_levels
from megatron.core.models.mimo.model.merging.merge import embed_streams
from megatron.core.utils import unwrap_model

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel


def merged_with_text(
    model: MimoModel,
    inputs: ForwardInputs,
    rows: Rows,
    plan: AlignmentPlan,
    *,
    cut: SequenceCut,
    packed: Any,
) -> MergedSequence:
    """Text and modality rows together: this rank's share, [S_local, B, H], and levels of the rows.

    Args:
        model: on its first pipeline stage.
        inputs: inputs of the micro-batch, uncut.
        rows: modality -> rows [N, H].
        plan: where they go, uncut.
        cut: how sequences are cut.
        packed: the documents of a packed sequence.
    """
    embedding = unwrap_model(model.language_model).embedding
    refuse_scattering_embedding(model.language_model, model.partition_adapter)
    encoded = {name: EncodedRows.of(one) for name, one in rows.items()}
    # Rows [0, H] place nothing; they carry a gradient to the parameters they come from.
    idle = [tensor for one in encoded.values() if not one.num_rows for tensor in one.tensors]
    encoded = {name: one for name, one in encoded.items() if one.num_rows}
    rows_NH = {name: one.rows_NH for name, one in encoded.items()}
    levels: tuple[LevelRows, ...] = ()
    if model.merges_by_script or not isinstance(embedding, LanguageModelEmbedding):
        refuse_levels_without_plan(encoded)
        hidden_SBH = model.merge_by_script(inputs, rows_NH, plan, packed)
    else:
        own_plan = cut.share_of_plan(plan)
        hidden_SBH = embed_streams(embedding, own_plan, rows_NH, inputs.position_ids)
        levels = place_levels(
            encoded, own_plan, hidden_size=hidden_SBH.size(-1), tp_group=embedding.tp_group
        )
    hidden_SBH = take_part(hidden_SBH, idle)
    if torch.is_grad_enabled() and not hidden_SBH.requires_grad:
        # Layers that are recomputed in backward get gradients only where their input needs one.
        trains = any(p.requires_grad for p in model.language_model.parameters())
        hidden_SBH.requires_grad_(trains)
    return MergedSequence(hidden_SBH=hidden_SBH, levels=levels)


def arrived_from_stage_before(
    model: MimoModel, inputs: ForwardInputs, *, cut: SequenceCut, tally: Tally | None
) -> MergedSequence:
    """Hidden states of the stage before, and the levels of rows that came with them.

    Args:
        model: on a later pipeline stage.
        inputs: inputs of the micro-batch, uncut.
        cut: how sequences are cut.
        tally: keeps the sums of experts that came with them; None where none are sent.

    Raises:
        InputError: nothing has arrived, or nothing says where levels go.
    """
    if model.input_tensors is None:
        raise InputError(
            "no hidden states have arrived from the previous pipeline stage; call "
            "set_input_tensor before every forward"
        )
    message = model.input_tensors
    if isinstance(message, dict):
        message = message[MIMO_LANGUAGE_MODULE_KEY]
    language_model: Any = unwrap_model(model.language_model)
    if tally is not None:
        message = tally.received(message)
        if not model.level_route.arrives:
            batch, length = tally.padding_BS.shape
            message = message.view(length, batch, -1)
            language_model.set_input_tensor(message)
    if not model.level_route.arrives:
        return MergedSequence(hidden_SBH=message)
    if inputs.plan is None and inputs.input_ids_BS is None:
        raise InputError(
            "levels of rows have arrived with the hidden states, and neither alignment_plan "
            "nor input_ids say where they go; give this pipeline stage one of both"
        )
    plan = inputs.plan
    if plan is None:
        plan = plan_of(inputs, model.special_token_ids, language_model)
    arrived = model.level_route.received(message, cut.share_of_plan(plan))
    language_model.set_input_tensor(arrived.hidden_SBH)
    return arrived
