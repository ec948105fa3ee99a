"""Merging text and modality rows, with the adjoints that sharding needs.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.mimo.alignment import (
    AlignmentPlan,
    Stream,
    place_rows,
    take_rows,
)
from megatron.core.models.mimo.alignment.row_index import kernels_for
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.batch.checks import check_rows
from megatron.core.models.mimo.model.merging.host_memory import empty_like_rows
from megatron.core.models.mimo.model.merging.lookup import call_as, look_up_rows, look_up_text
from megatron.core.models.mimo.model.merging.merge_by_kernels import (
    merge_with_table,
    place_by_kernels,
    reads_table,
    take_by_kernels,
)
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import get_pg_rank


def embed_streams(
    embedding: LanguageModelEmbedding,
    plan: AlignmentPlan,
    rows: Mapping[str, torch.Tensor],
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Embeddings [S_local, B, H] of text and modality rows together, as ``embedding`` makes them.

    Text rows are looked up and scaled; after the merge, learned positions, the residual dtype
    and dropout apply to every row alike. Under sequence parallelism dropout draws from the
    model-parallel generator, because each rank holds other positions.

    Args:
        embedding: the language model's embedding layer.
        plan: this rank's plan, on the embedding's device.
        rows: modality -> [N, H], only modalities that have rows.
        position_ids: long [B, S] or [3, B, S] of the uncut sequence.

    Raises:
        InputError: rows of another width or dtype; no position ids for learned positions.
    """
    config, table = embedding.config, embedding.word_embeddings
    scale = getattr(config, "mup_embedding_mult", 1.0) if getattr(config, "use_mup", 0) else 1.0
    if scale == 1.0 and reads_table(table, plan, rows):
        for name, rows_NH in rows.items():
            check_rows(name, rows_NH, table.weight.size(1), table.weight.dtype)
        merged_SBH = merge_with_table(table, plan, rows)
    else:
        text_NH = look_up_text(table, plan)
        for name, rows_NH in rows.items():
            check_rows(name, rows_NH, text_NH.size(1), text_NH.dtype)
        if scale != 1.0:
            text_NH = text_NH * scale
        merged_SBH = merge_streams(plan, {TEXT: text_NH, **rows}, tp_group=embedding.tp_group)
    if embedding.add_position_embedding:
        merged_SBH = merged_SBH + _position_rows(embedding, plan, position_ids)
    if config.fp32_residual_connection:
        merged_SBH = merged_SBH.float()
    generator = get_cuda_rng_tracker().fork() if config.sequence_parallel else nullcontext()
    with generator:
        embedded_SBH: torch.Tensor = embedding.embedding_dropout(merged_SBH)
    return embedded_SBH


def _position_rows(
    embedding: LanguageModelEmbedding, plan: AlignmentPlan, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Learned position embeddings [S_local, B, H].

    The table is replicated. Under sequence parallelism each rank looks up its own positions, and
    the ranks of the tensor-parallel group take part in one all-reduce of the table's gradient.
    """
    if position_ids is None:
        raise InputError(
            "position_ids are None, and the language model has learned position embeddings; "
            "pass long [B, S]"
        )
    positions_BS = position_ids[0] if position_ids.dim() == 3 else position_ids
    if plan.positions_S is not None:
        positions_BS = positions_BS.index_select(1, plan.positions_S)
    positions_SB, table = positions_BS.t(), embedding.position_embeddings

    def forward(positions_SB: torch.Tensor) -> torch.Tensor:
        weight_PH: torch.Tensor = table.weight
        if plan.pieces:
            weight_PH = copy_to_tensor_model_parallel_region(weight_PH, group=embedding.tp_group)
        return look_up_rows(weight_PH, positions_SB)

    return call_as(table, forward, positions_SB)


def merge_streams(
    plan: AlignmentPlan,
    rows: dict[str, torch.Tensor],
    *,
    tp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Merged embeddings [S_local, B, H] of streams given as ``{name: [N, H]}``.

    Each row that has a place here is copied once. Modality rows are the same on every rank of
    ``tp_group``; with a sequence-parallel plan (``plan.pieces``) a rank places some of them, and
    in backward each rank broadcasts the gradient of those it placed, so that all ranks hold the
    gradient of all rows. Under context parallelism a row's gradient is this rank's share, which
    the data-parallel reduction over dp x cp sums.
    """
    merged_SBH: torch.Tensor = _MergeStreams.apply(plan, tp_group, tuple(rows), *rows.values())
    return merged_SBH


class _MergeStreams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: AlignmentPlan,
        tp_group: dist.ProcessGroup | None,
        names: tuple[str, ...],
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.plan, ctx.tp_group, ctx.names = plan, tp_group, names
        ctx.num_rows = [rows_NH.size(0) for rows_NH in rows]
        merged_SBH = empty_like_rows(
            (plan.sequence_length, plan.batch_size, rows[0].size(1)), rows[0]
        )
        kernels = kernels_for(plan.index, *rows)
        if kernels is not None:
            place_by_kernels(kernels, plan, merged_SBH, dict(zip(names, rows, strict=True)))
            return merged_SBH
        for name, rows_NH in zip(names, rows, strict=True):
            place_rows(merged_SBH, plan.streams[name], rows_NH)
        return merged_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grads = gradients_of_rows(
            grad_outputs[0],
            ctx.plan,
            names=ctx.names,
            counts=ctx.num_rows,
            needed=ctx.needs_input_grad[3:],
            group=ctx.tp_group,
        )
        return None, None, None, *grads


def gradients_of_rows(
    grad_SBH: torch.Tensor,
    plan: AlignmentPlan,
    *,
    names: Sequence[str],
    counts: Sequence[int],
    needed: Sequence[bool],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor | None]:
    """Gradients [N, H] of rows that were placed by a plan, None where none is needed.

    With a sequence-parallel plan, all ranks of ``group`` take part: each broadcasts the gradient
    of the modality rows that it placed. With a plan of ``own_rows`` nothing is exchanged.

    Args:
        grad_SBH: gradient of this rank's merged sequence.
        plan: by which the rows were placed.
        names: the streams that the rows are of.
        counts: N of each stream.
        needed: whether each stream's gradient is wanted; equal on all ranks.
        group: the tensor-parallel ranks.
    """
    grads: list[torch.Tensor | None] = []
    found: dict[str, torch.Tensor] = {}
    kernels = kernels_for(plan.index, grad_SBH)
    if kernels is not None:
        wants = [name for name, wanted in zip(names, needed, strict=True) if wanted]
        found = take_by_kernels(kernels, plan, grad_SBH, wants)
    for name, count, wanted in zip(names, counts, needed, strict=True):
        if not wanted:
            grads.append(None)
        elif name != TEXT and plan.pieces and not plan.own_rows:
            streams = [piece.streams[name] for piece in plan.pieces]
            assert group is not None, "only a tensor-parallel group has pieces"
            own_nH = found.get(name)
            if own_nH is None:
                own_nH = take_rows(grad_SBH, replace(plan.streams[name], sources_N=None), count)
            grads.append(exchange_rows(own_nH, streams, count, group))
        elif name in found:
            grads.append(found[name])
        else:
            grads.append(take_rows(grad_SBH, plan.streams[name], count))
    return grads


def exchange_rows(
    own_nH: torch.Tensor,
    streams: Sequence[Stream],
    num_rows: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Gradient [num_rows, H] of rows that the ranks of ``group`` placed, each its own part.

    Args:
        own_nH: gradient of the rows that this rank placed, in the order of its stream.
        streams: the modality's stream on every rank of ``group``.
        num_rows: N of the modality.
        group: takes part: each rank broadcasts its part.
    """
    rank, hidden = get_pg_rank(group), own_nH.size(-1)
    grad_NH = own_nH.new_zeros(num_rows, hidden)
    for source, stream in enumerate(streams):
        if not stream.rows_N.numel():
            continue
        assert stream.sources_N is not None, "a cut names the source of every modality row"
        part_nH = own_nH.contiguous()
        if source != rank:
            part_nH = own_nH.new_empty(stream.rows_N.numel(), hidden)
        dist.broadcast(part_nH, group_src=source, group=group)
        grad_NH.index_copy_(0, stream.sources_N, part_nH)
    return grad_NH
