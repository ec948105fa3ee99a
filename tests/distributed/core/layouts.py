"""The same model under a parallel layout, run by Megatron's own schedules, DDP and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.distributed.core.recompute import recompute_settings
from tests.distributed.core.reference import (
    MICRO_BATCH,
    PLACEHOLDERS,
    SEQUENCE,
    Design,
    Sample,
    build_model,
    make_batches,
    reference_step,
    transformer_config,
)
from tests.distributed.core.whole import Part, Tensors, parts, whole
from tests.distributed.schedule import Sizes, loss_of_labels, run_schedule
from tests.rank_pool import model_parallel

__all__ = [  # with what other tests know from here
    "CLIP",
    "EPSILON",
    "LEARNING_RATE",
    "Deviation",
    "Layout",
    "Outcome",
    "Part",
    "Tensors",
    "build_chunks",
    "copy_weights",
    "model_inputs",
    "parts",
    "run_gradients",
    "run_reference",
    "run_step",
    "run_training",
    "wrap_chunks",
]

LEARNING_RATE, EPSILON, CLIP = 1e-2, 1e-3, 0.05
SMALL_BUCKET = 600  # parameters: some ten buckets, so that the order of reductions matters


@dataclass(frozen=True, kw_only=True)
class Layout(Sizes):
    """Parallel sizes, and how the work is cut, repeated, reduced and optimized.

    Attributes:
        vpp: chunks of each pipeline stage, under the interleaved schedule.
        stages: which layers each chunk holds, as ``pipeline_model_parallel_layout``; "" for even.
        recompute: what is recomputed; see ``recompute_settings``.
        etp: tensor-parallel size of the experts; None for ``tp``.
        dispatcher: how tokens reach their experts, "alltoall" or "allgather".
        micro_batch: samples of a micro-batch.
        packed: a micro-batch is one row of documents, not a row for each.
    """

    ep: int = 1
    etp: int | None = None
    dispatcher: str = "alltoall"
    vpp: int | None = None
    stages: str = ""
    sequence_parallel: bool = False
    recompute: str = ""
    micro_batch: int = MICRO_BATCH
    packed: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_optimizer: bool = False

    @property
    def group_sizes(self) -> dict[str, Any]:
        """What the process groups depend on."""
        return {name: getattr(self, name) for name in ("tp", "pp", "cp", "ep", "etp", "vpp")}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one process: what every layout has to reproduce."""

    weights: Tensors
    losses: list[float]
    gradients: list[Tensors]
    norms: list[float]
    trained_losses: list[float]
    trained: Tensors


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Of one rank: relative errors, and which elements of which full tensors it compared."""

    losses: list[float]
    errors: dict[str, float]
    norms: list[float]
    covered: dict[str, set[tuple[Any, ...]]]


def run_reference(design: Design) -> Outcome:
    """One process, plain loops, plain AdamW; runs on a pool of one rank."""
    groups = model_parallel()
    model = build_model(transformer_config(design), design, groups, first=True, last=True)
    losses, gradients = [], []
    for batch in make_batches(design):
        model.zero_grad()
        losses.append(reference_step(model, batch).item())
        gradients.append(whole(model, lambda parameter: parameter.grad))
    weights = whole(model, lambda parameter: parameter.data)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=LEARNING_RATE, eps=EPSILON, betas=(0.9, 0.99), weight_decay=0.0
    )
    norms, trained_losses = [], []
    for batch in make_batches(design):
        optimizer.zero_grad()
        trained_losses.append(reference_step(model, batch).item())
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, CLIP).item())
        optimizer.step()
    return Outcome(
        weights=weights,
        losses=losses,
        gradients=gradients,
        norms=norms,
        trained_losses=trained_losses,
        trained=whole(model, lambda parameter: parameter.data),
    )


def run_gradients(layout: Layout, design: Design, reference: Outcome) -> Deviation:
    """Loss and gradients of every batch, with weights as they are; runs on every rank."""
    model, wrapped = _build(layout, design, reference.weights)
    losses: list[float] = []
    errors: dict[str, float] = {}
    covered: dict[str, set[tuple[Any, ...]]] = {}
    for batch, gradients in zip(make_batches(), reference.gradients, strict=True):
        wrapped.zero_grad_buffer()
        losses.append(run_step(layout, design, [wrapped], batch))
        for part in parts(model):
            assert part.parameter.requires_grad == (part.key in gradients), part.name
            if part.parameter.requires_grad:
                error = part.error(part.parameter.main_grad, gradients)
                errors[part.name] = max(errors.get(part.name, 0.0), error)
                covered.setdefault(part.key, set()).add(part.span())
    return Deviation(losses=losses, errors=errors, norms=[], covered=covered)


def run_training(layout: Layout, design: Design, reference: Outcome) -> Deviation:
    """A step of the optimizer per batch; compares weights after the last."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model, wrapped = _build(layout, design, reference.weights)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_beta1=0.9,
            adam_beta2=0.99,
            adam_eps=EPSILON,
            weight_decay=0.0,
            clip_grad=CLIP,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        [wrapped],
    )
    losses, norms = [], []
    for batch in make_batches():
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run_step(layout, design, [wrapped], batch))
        success, norm, _ = optimizer.step()
        assert success
        norms.append(float(norm))
    if layout.overlap_param_gather:
        wrapped.disable_forward_pre_hook()
    errors, covered = {}, {}
    for part in parts(model):
        errors[part.name] = part.error(part.parameter.data, reference.trained)
        covered.setdefault(part.key, set()).add(part.span())
    return Deviation(losses=losses, errors=errors, norms=norms, covered=covered)


def config_changes(layout: Layout) -> dict[str, Any]:
    """What a layout changes in the transformer's configuration."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "pipeline_model_parallel_layout": layout.stages or None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "moe_token_dispatcher_type": layout.dispatcher,
        "sequence_parallel": layout.sequence_parallel,
        # Megatron's defaults: between the two ranks of pp 2 an interleaved schedule needs them.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        # What Megatron's training loop sets with the distributed optimizer: outputs of a
        # stage are freed once they are sent.
        "deallocate_pipeline_outputs": True,
        **recompute_settings(layout.recompute),
    }


def build_chunks(layout: Layout, design: Design, groups: Any) -> list[Any]:
    """This rank's parts of the model, one for each virtual stage, unwrapped."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    config = transformer_config(
        design, finalize_model_grads_func=finalize_model_grads, **config_changes(layout)
    )
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    count = layout.vpp or 1
    return [
        build_model(
            config,
            design,
            groups,
            first=first and number == 0,
            last=last and number == count - 1,
            vp_stage=None if layout.vpp is None else number,
            recompute_projections=layout.recompute == "projections",
            packed=layout.packed,
        )
        for number in range(count)
    ]


def wrap_chunks(layout: Layout, design: Design, chunks: list[Any]) -> list[Any]:
    """Each chunk in Megatron's wrappers, as its training loop wraps them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    config = chunks[0].config
    wrapped = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                overlap_grad_reduce=layout.overlap_grad_reduce,
                overlap_param_gather=layout.overlap_param_gather,
                use_distributed_optimizer=layout.distributed_optimizer,
                grad_reduce_in_fp32=True,
                bucket_size=SMALL_BUCKET,
            ),
            Float16Module(config, chunk) if design.bf16 else chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]

    def of_each(name: str) -> Any:
        functions = [getattr(chunk, name) for chunk in wrapped]
        return functions if len(functions) > 1 else functions[0]

    if layout.overlap_grad_reduce:
        config.no_sync_func = of_each("no_sync")
    if layout.overlap_grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = of_each("start_grad_sync")
    if layout.overlap_param_gather and len(wrapped) > 1:
        config.param_sync_func = of_each("start_param_sync")
    return wrapped


def _build(layout: Layout, design: Design, weights: Tensors) -> tuple[Any, Any]:
    groups = model_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, vpp=layout.vpp)
    chunks = build_chunks(layout, design, groups)
    copy_weights(chunks, weights)
    assert len(chunks) == 1
    return chunks[0], wrap_chunks(layout, design, chunks)[0]


def copy_weights(chunks: list[Any], weights: Tensors) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for part in parts(chunk):
                part.parameter.copy_(part.of(weights))


def run_step(layout: Layout, design: Design, wrapped: list[Any], batch: list[Sample]) -> float:
    """Forward and backward of a global batch by Megatron's schedule; the loss on every rank."""
    from megatron.core import parallel_state

    dp_rank = parallel_state.get_data_parallel_rank()
    size = layout.micro_batch
    mine = [batch[i : i + size] for i in range(0, len(batch), size)][dp_rank :: layout.dp]
    for chunk in wrapped:
        chunk.train()
    return run_schedule(
        wrapped,
        list(enumerate(mine)),
        partial(_forward_step, layout=layout, design=design),
        seq_length=SEQUENCE * size if layout.packed else SEQUENCE,
        micro_batch_size=1 if layout.packed else size,
    )


def _forward_step(
    data_iterator: Any, model: Any, layout: Layout | None = None, design: Design | None = None
) -> tuple[torch.Tensor, Any]:
    from megatron.core.utils import get_model_config

    number, samples = next(data_iterator)
    batch = model_inputs(
        samples,
        layout or Layout(),
        design or Design(),
        dtype=get_model_config(model).params_dtype,
        # A plan in every other micro-batch: both ways have to give the same.
        plan=number % 2 == 0,
    )
    return loss_of_labels(iter([batch]), model)


def model_inputs(
    samples: list[Sample], layout: Layout, design: Design, *, dtype: torch.dtype, plan: bool
) -> dict[str, Any]:
    """Arguments of ``MimoModel.forward`` for a micro-batch of samples."""
    from megatron.core.models.mimo.alignment import build_alignment_plan

    def rows(field: str) -> torch.Tensor:
        values = [getattr(sample, field) for sample in samples]
        if field == "positions_3S":
            return torch.cat(values, dim=1)[:, None] if layout.packed else torch.stack(values, 1)
        return torch.cat(values)[None] if layout.packed else torch.stack(values)

    media = {
        "images": {"vit": {"pixel_values": torch.cat([sample.images for sample in samples])}},
        "sounds": {"linear": {"waves": torch.cat([sample.sounds for sample in samples]).to(dtype)}},
    }
    ids_BS = rows("ids_S")
    plain_BS = torch.arange(SEQUENCE).repeat(len(samples)).view_as(ids_BS)
    batch = {
        "input_ids": ids_BS,
        "position_ids": rows("positions_3S") if design.mrope else plain_BS,
        "labels": rows("labels_S"),
        "loss_mask": rows("mask_S"),
        "modality_inputs": {
            name: inputs
            for name, inputs in media.items()
            if any(len(value) for encoder in inputs.values() for value in encoder.values())
        },
        "alignment_plan": build_alignment_plan(ids_BS, PLACEHOLDERS) if plan else None,
    }
    if layout.packed:
        bounds = [SEQUENCE * count for count in range(len(samples) + 1)]
        batch["packing_kwargs"] = {"cu_seqlens_q": bounds}
    if design.spans:
        first = torch.arange(len(samples)).repeat_interleave(SEQUENCE).view_as(ids_BS) * SEQUENCE
        spans_BS = rows("spans_S")
        batch["span_ids"] = torch.where(spans_BS > 0, spans_BS + first, 0)
    return batch
