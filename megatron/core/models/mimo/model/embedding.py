"""Looking text up and merging it with modality rows, with the adjoints that sharding needs.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.mimo.alignment import AlignmentPlan, cut_plan, place_rows, take_rows
from megatron.core.models.mimo.config.base_configs import TEXT
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.model.host_memory import empty_like_rows, host_zeros
from megatron.core.models.mimo.model.inputs import check_rows
from megatron.core.models.mimo.partition.positions import sequence_parallel_positions
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import get_pg_rank, get_pg_size


def embed_streams(
    embedding: LanguageModelEmbedding,
    plan: AlignmentPlan,
    rows: Mapping[str, torch.Tensor],
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """What ``embedding`` makes of a text, for text and modality rows together: [S_local, B, H].

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
    config = embedding.config
    text_NH = look_up_text(embedding.word_embeddings, plan.text_ids_N)
    for name, rows_NH in rows.items():
        check_rows(name, rows_NH, text_NH.size(1), text_NH.dtype)
    scale = getattr(config, "mup_embedding_mult", 1.0) if getattr(config, "use_mup", 0) else 1.0
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

    Under sequence parallelism every rank of the tensor-parallel group looks up all positions of
    the group's sequence, drops those of the others, and takes part in an all-gather of the
    gradient [S_local, B, H] in backward: the table is replicated, and no one sums its gradient.
    """
    if position_ids is None:
        raise InputError(
            "position_ids are None, and the language model has learned position embeddings; "
            "pass long [B, S]"
        )
    positions_BS = position_ids[0] if position_ids.dim() == 3 else position_ids
    held = plan.group or plan
    if held.positions_S is not None:
        positions_BS = positions_BS.index_select(1, held.positions_S)
    rows_SBH: torch.Tensor = embedding.position_embeddings(positions_BS.t())
    if plan.group is not None:
        rows_SBH = scatter_to_sequence_parallel_region(rows_SBH, group=embedding.tp_group)
    return rows_SBH


def cut_for_rank(plan: AlignmentPlan, adapter: PartitionAdapter, packed: Any) -> AlignmentPlan:
    """The plan of this rank's context- and sequence-parallel part.

    Made on the host (where the plan is) it costs no synchronisation: a training loop calls it
    before it moves the batch.

    Args:
        plan: the plan of the whole sequence.
        adapter: the model's ``partition_adapter``.
        packed: ``PackedSeqParams`` of a packed batch, else None.
    """
    config = adapter.cfg
    device = plan.text_ids_N.device
    if packed is None:
        adapter.check_length(plan.sequence_length)
    if config.use_cp:
        positions_S = adapter.positions(plan.sequence_length, packed)
        plan = cut_plan(plan, positions_S.to(device))
    if config.seq_parallel:
        positions_S = sequence_parallel_positions(
            plan.sequence_length,
            tp_rank=get_pg_rank(config.tp_group),
            tp_size=get_pg_size(config.tp_group),
        )
        plan = cut_plan(plan, positions_S.to(device), sequence_parallel=True)
    return plan


def merge_streams(
    plan: AlignmentPlan,
    rows: dict[str, torch.Tensor],
    *,
    tp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Merged embeddings [S_local, B, H] of streams given as ``{name: [N, H]}``.

    Rows are copied once. With a sequence-parallel plan (``plan.group``) every rank of
    ``tp_group`` takes part in one all-gather of the gradient [S_local, B, H] in backward, and
    each then holds the gradient of every row, consumed here or not; the rows have to be the same
    on all of them. Under context parallelism a row's gradient holds this rank's share, which the
    data-parallel reduction over dp x cp sums.
    """
    if plan.group is None:
        tp_group = None
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
        for name, rows_NH in zip(names, rows, strict=True):
            place_rows(merged_SBH, plan.streams[name], rows_NH)
        return merged_SBH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grad_SBH = grad_outputs[0]
        plan = ctx.plan
        if ctx.tp_group is not None:
            grad_SBH = _gather_sequence(grad_SBH, ctx.tp_group)
            plan = plan.group
        grads = [
            take_rows(grad_SBH, plan.streams[name], num_rows) if needed else None
            for name, num_rows, needed in zip(
                ctx.names, ctx.num_rows, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return None, None, None, *grads


def _gather_sequence(local_SBH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate dimension 0 over the group: every rank gives [S_local, B, H]."""
    size = get_pg_size(group)
    if size == 1:
        return local_SBH
    whole_SBH = local_SBH.new_empty(local_SBH.size(0) * size, *local_SBH.shape[1:])
    dist.all_gather_into_tensor(whole_SBH, local_SBH.contiguous(), group=group)
    return whole_SBH


def look_up_text(word_embeddings: torch.nn.Module, ids_N: torch.Tensor) -> torch.Tensor:
    """Word embeddings [N, H] of token ids [N], placeholders already left out.

    Under tensor parallelism the ranks of the module's group take part in one all-reduce of
    [N, H]: only text rows travel. On CPU a plain table is read directly, because its gradient
    can then be made without touching the rows of tokens that do not occur.
    """
    if ids_N.device.type == "cpu" and _is_plain_table(word_embeddings):
        text_NH: torch.Tensor = _CpuLookup.apply(word_embeddings.weight, ids_N)
    else:
        text_NH = word_embeddings(ids_N.unsqueeze(0)).squeeze(0)
    return text_NH


def _is_plain_table(module: torch.nn.Module) -> bool:
    # Hooks wait for gathered parameters or observe outputs: only a call of the module runs them.
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
    return (
        type(module) is VocabParallelEmbedding
        and get_pg_size(module.tp_group) == 1
        and getattr(module, "gtp_remat_size", 1) == 1
        and not hooked
    )


class _CpuLookup(torch.autograd.Function):
    """Table lookup whose [V, H] gradient touches only the rows of tokens that occur."""

    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids_N)
        ctx.shape, ctx.dtype = weight_VH.shape, weight_VH.dtype
        return weight_VH.index_select(0, ids_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (ids_N,) = ctx.saved_tensors
        grad_VH = host_zeros(ctx.shape, ctx.dtype)
        return grad_VH.index_add_(0, ids_N, grad_outputs[0]), None
