"""The plan of a micro-batch, from its token ids or from the positions of each stream.

Legend: S sequence, B micro-batch, N rows of one stream (text or a modality), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from megatron.core.models.mimo.alignment.plan import AlignmentPlan, RowOrder, Stream
from megatron.core.models.mimo.alignment.rows import with_runs
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError


def build_alignment_plan(
    input_ids_BS: torch.Tensor,
    special_token_ids: Mapping[str, int],
    *,
    vocab_size: int | None = None,
    row_order: Mapping[str, RowOrder] | None = None,
) -> AlignmentPlan:
    """Make the plan of a micro-batch; call it where ``input_ids`` are still on the host.

    Args:
        input_ids_BS: integer [B, S].
        special_token_ids: modality -> placeholder token id.
        vocab_size: V; when given, text ids are checked against it.
        row_order: for modalities whose rows do not come in the order of their placeholders, as
            those of several encoders.

    Raises:
        InputError: ids that are not an integer [B, S], negative, or outside the vocabulary; an
            order that is not each row of its modality once.
    """
    check_input_ids(input_ids_BS)
    batch_size, sequence_length = input_ids_BS.shape
    indices = {}
    is_text_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    for name, token_id in special_token_ids.items():
        is_modality_BS = input_ids_BS == token_id
        indices[name] = is_modality_BS.reshape(-1).nonzero().squeeze(1)
        is_text_BS &= ~is_modality_BS
    indices[TEXT] = is_text_BS.reshape(-1).nonzero().squeeze(1)
    plan = _make_plan(input_ids_BS, indices)
    _check_vocabulary(plan.text_ids_N, indices[TEXT], sequence_length, vocab_size)
    plan = _with_order(plan, row_order or {})
    if input_ids_BS.device.type != "cpu":
        return plan
    return replace(plan, streams=with_runs(plan.streams, batch_size))


def plan_from_indices(
    input_ids_BS: torch.Tensor, modality_token_indices: Mapping[str, torch.Tensor]
) -> AlignmentPlan:
    """Make a plan from flat batch-major positions, without a host synchronisation.

    Args:
        input_ids_BS: integer [B, S].
        modality_token_indices: modality, and "text", -> long [N], positions ``b * S + s``.

    Raises:
        InputError: "text" is missing, or the positions are not B * S; on the host also where they
            are not each position once.
    """
    check_input_ids(input_ids_BS)
    batch_size, sequence_length = input_ids_BS.shape
    given = sum(index_N.numel() for index_N in modality_token_indices.values())
    complete = TEXT in modality_token_indices and given == batch_size * sequence_length
    if complete and all(
        index_N.device.type == "cpu" for index_N in modality_token_indices.values()
    ):
        ordered = torch.cat([*modality_token_indices.values()]).sort().values
        complete = torch.equal(ordered, torch.arange(given))
    if not complete:
        raise InputError(
            f"modality_token_indices name {given} positions under "
            f"{sorted(modality_token_indices)}; expected the {batch_size} * {sequence_length} "
            f"positions of input_ids, each once, those of ordinary tokens under {TEXT!r}"
        )
    return _make_plan(input_ids_BS, modality_token_indices)


def _make_plan(input_ids_BS: torch.Tensor, indices: Mapping[str, torch.Tensor]) -> AlignmentPlan:
    batch_size, sequence_length = input_ids_BS.shape
    flat_ids = input_ids_BS.reshape(-1)
    streams = {
        name: Stream(
            rows_N=index_N % sequence_length * batch_size
            + torch.div(index_N, sequence_length, rounding_mode="floor")
        )
        for name, index_N in indices.items()
    }
    return AlignmentPlan(
        sequence_length=sequence_length,
        batch_size=batch_size,
        text_ids_N=flat_ids.index_select(0, indices[TEXT]),
        streams=streams,
        counts={name: index_N.numel() for name, index_N in indices.items() if name != TEXT},
    )


def check_input_ids(input_ids_BS: torch.Tensor) -> None:
    """Raise ``InputError`` unless ``input_ids`` are integers [B, S]."""
    if input_ids_BS.dim() != 2:
        raise InputError(
            f"input_ids have shape {tuple(input_ids_BS.shape)}; expected [batch, sequence] "
            "(add the batch dimension with unsqueeze(0))"
        )
    if input_ids_BS.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids are {input_ids_BS.dtype}; expected torch.int64 or torch.int32 token ids"
        )


def _with_order(plan: AlignmentPlan, row_order: Mapping[str, RowOrder]) -> AlignmentPlan:
    streams = dict(plan.streams)
    for name, order in row_order.items():
        count = plan.counts.get(name)
        whole = torch.arange(order.sources_N.numel())
        if order.sources_N.numel() != count or not torch.equal(order.sources_N.sort()[0], whole):
            raise InputError(
                f"row_order of {name!r} has {order.sources_N.numel()} rows for "
                f"{count} placeholders; expected each row number once"
            )
        streams[name] = replace(streams[name], sources_N=order.sources_N)
    encoders = {name: order.encoders for name, order in row_order.items()}
    return replace(plan, streams=streams, encoders=encoders)


def _check_vocabulary(
    text_ids_N: torch.Tensor, index_N: torch.Tensor, sequence_length: int, vocab_size: int | None
) -> None:
    wrong_N = text_ids_N < 0
    if vocab_size is not None:
        wrong_N |= text_ids_N >= vocab_size
    if not bool(wrong_N.any()):
        return
    first = int(wrong_N.nonzero()[0])
    sample, position = divmod(int(index_N[first]), sequence_length)
    bounds = "non-negative" if vocab_size is None else f"in 0..{vocab_size - 1}"
    raise InputError(
        f"input_ids[{sample}, {position}] is {int(text_ids_N[first])}; a token id has to be "
        f"{bounds}, unless it is the placeholder of a modality in special_token_ids"
    )
