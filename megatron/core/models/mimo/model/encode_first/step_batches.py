"""The micro-batches of a step on a rank of the language model, and where their rows go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    build_alignment_plan,
    with_row_index,
)
from megatron.core.models.mimo.alignment.cut import with_own_rows
from megatron.core.models.mimo.comm.row_routes import Placement
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.encode_first.encoder_work import Job
from megatron.core.models.mimo.partition.packing import packed_params
from megatron.core.models.mimo.partition.utils import sequence_cut

MicroBatch = dict[str, Any]


class StepBatches:
    """Mappings of ``MimoModel.forward``'s arguments, whose plans are cut for this rank here.

    Args:
        model: this rank's first chunk.
        batches: micro-batches of this rank's replica, their plans uncut.
    """

    def __init__(self, model: MimoModel, batches: Sequence[MicroBatch]) -> None:
        self._model = model
        self.batches = batches
        self._plans = [_uncut_plan(model, batch) for batch in batches]
        self._cuts = [_cut(model, batch) for batch in batches]

    def jobs(self, name: str, replica: int, seed: int | None) -> list[Job]:
        """What the encoders of a modality have to do, micro-batch by micro-batch.

        Args:
            name: name of the modality.
            replica: number of the language model's replica that this rank is in.
            seed: for their random numbers; None where they draw none.
        """
        return [
            Job(
                replica=replica,
                inputs=(batch.get("modality_inputs") or {}).get(name),
                placement=_placement(name, plan, cut),
                seed=seed,
            )
            for batch, plan, cut in zip(self.batches, self._plans, self._cuts, strict=True)
        ]

    def cut_plans(self, *, reads: bool) -> None:
        """Turn each micro-batch into what its forward on this rank takes, all but the rows.

        Encoders' inputs are dropped, and the plan is cut.

        Args:
            reads: this rank places rows.
        """
        model = self._model
        device = next(model.parameters()).device
        for batch, plan, cut in zip(self.batches, self._plans, self._cuts, strict=True):
            batch.pop("modality_inputs", None)
            batch.pop("alignment_plan", None)
            if not reads and not model.level_route.arrives:
                continue
            share = cut.share_of_plan(plan)
            if reads:
                share = with_own_rows(share)
                if plan.index is not None:  # a cut has dropped it
                    share = with_row_index(share)
            batch["alignment_plan"] = share.to(device)


def _cut(model: MimoModel, batch: Mapping[str, Any]) -> Any:
    adapter = model.partition_adapter
    if adapter is None:
        return sequence_cut(None, None)
    packed = packed_params(
        batch.get("packing_kwargs"),
        tokens=batch["input_ids"].size(1),
        cp_size=adapter.cp_size,
    )
    return sequence_cut(adapter, packed)


def _placement(name: str, plan: AlignmentPlan, cut: Any) -> Placement:
    """Which rows of a micro-batch each rank of the first stage places."""
    sources = {}
    for cp_rank in range(cut.cp_size):
        share = cut.of_rank(cp_rank=cp_rank, tp_rank=0).share_of_plan(plan)
        for tp_rank, piece in enumerate(share.pieces or (share,)):
            stream = piece.streams.get(name)
            source_n = torch.empty(0, dtype=torch.long)
            if stream is not None:
                source_n = stream.sources_N
                if source_n is None:
                    source_n = torch.arange(stream.rows_N.numel())
            sources[cp_rank, tp_rank] = source_n
    return Placement(rows=plan.counts.get(name, 0), sources=sources)


def _uncut_plan(model: MimoModel, batch: Mapping[str, Any]) -> AlignmentPlan:
    plan: AlignmentPlan | None = batch.get("alignment_plan")
    if plan is None:
        ids_BS = batch["input_ids"].cpu()
        return build_alignment_plan(ids_BS, model.special_token_ids)
    if plan.positions_S is not None or plan.pieces:
        raise InputError(
            "alignment_plan is cut for one rank already, and EncodeFirst finds out what all ranks "
            "of the first stage place; give it the plan of the whole sequence"
        )
    return plan.to("cpu")
