"""A rank's share of a sequence."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.core.models.mimo.alignment.plan import AlignmentPlan, Stream
from megatron.core.models.mimo.alignment.rows import with_runs
from megatron.core.models.mimo.config.base_configs import TEXT


def cut_plan(plan: AlignmentPlan, positions_S: torch.Tensor) -> AlignmentPlan:
    """The part of a plan that a rank places when it holds only some positions.

    Args:
        plan: the plan of the sequence that is cut.
        positions_S: long [S_local], positions held, in the order in which they are held.

    Text rows of the part are those of its own ``text_ids_N``; modality rows are all there are,
    and ``sources_N`` says which of them go somewhere here.
    """
    local_S = positions_S.new_full((plan.sequence_length,), -1)
    local_S[positions_S] = torch.arange(positions_S.numel(), device=positions_S.device)
    text_ids_N = plan.text_ids_N
    streams: dict[str, Stream] = {}
    for name, stream in plan.streams.items():
        position_N = torch.div(stream.rows_N, plan.batch_size, rounding_mode="floor")
        sample_N = stream.rows_N % plan.batch_size
        local_N = local_S[position_N]
        kept_N = (local_N >= 0).nonzero().squeeze(1)
        rows_N = local_N[kept_N] * plan.batch_size + sample_N[kept_N]
        if name == TEXT:
            text_ids_N = text_ids_N[kept_N]
            streams[name] = Stream(rows_N=rows_N)
            continue
        sources_N = kept_N if stream.sources_N is None else stream.sources_N[kept_N]
        streams[name] = Stream(rows_N=rows_N, sources_N=sources_N)
    if positions_S.device.type == "cpu":
        streams = with_runs(streams, plan.batch_size)
    return replace(
        plan,
        sequence_length=positions_S.numel(),
        text_ids_N=text_ids_N,
        streams=streams,
        positions_S=positions_S if plan.positions_S is None else plan.positions_S[positions_S],
    )
