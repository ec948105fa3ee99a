"""Numbers of the spans whose tokens see each other. Legend: S sequence, B micro-batch, N rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron.core.models.mimo.alignment.plan import AlignmentPlan
from megatron.core.models.mimo.errors import InputError


def media_span_ids(
    plan: AlignmentPlan, item_rows: Mapping[str, Sequence[int]] | None = None
) -> torch.Tensor:
    """Number the spans of media: int32 [B, S], 0 at text, one number for each item's tokens.

    Args:
        plan: of a whole micro-batch, on the host.
        item_rows: modality -> rows of each of its items, in the order of their placeholders; the
            modalities whose items are spans. None: all modalities, and an item is a run of
            placeholders without a gap.

    Raises:
        InputError: rows that do not add up to the modality's placeholders.
    """
    span_ids_BS = torch.zeros(plan.batch_size, plan.sequence_length, dtype=torch.int32)
    used = 0
    for name in plan.counts if item_rows is None else item_rows:
        rows_N = plan.streams[name].rows_N
        if not rows_N.numel():
            continue
        if item_rows is None:
            breaks_N = (rows_N.diff() != plan.batch_size).int()
            numbers_N = torch.cat([breaks_N.new_zeros(1), breaks_N.cumsum(0)])
        else:
            lengths = torch.tensor(item_rows[name])
            if int(lengths.sum()) != rows_N.numel():
                raise InputError(
                    f"items of {name} have {int(lengths.sum())} rows together, and input_ids "
                    f"{rows_N.numel()} placeholders; give the rows of every item"
                )
            numbers_N = torch.arange(len(lengths)).repeat_interleave(lengths)
        samples_N = rows_N % plan.batch_size
        positions_N = torch.div(rows_N, plan.batch_size, rounding_mode="floor")
        span_ids_BS[samples_N, positions_N] = (numbers_N + used + 1).int()
        used += int(numbers_N[-1]) + 1
    return span_ids_BS
