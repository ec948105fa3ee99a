"""The same model under a parallel layout, run by Megatron's own schedules, DDP and optimizer.

Whole parameters are keyed by their checkpoint key and layer; a rank finds its part of each with
the sharding that its model reports for checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

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
from tests.rank_pool import model_parallel

LEARNING_RATE, EPSILON, CLIP = 1e-2, 1e-3, 0.05
SMALL_BUCKET = 600  # parameters: some ten buckets, so that the order of reductions matters

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes, and how data parallelism reduces and optimizes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_optimizer: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


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


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank holds of a whole parameter."""

    name: str
    parameter: torch.nn.Parameter
    key: str
    shape: tuple[int, ...]
    where: tuple[slice, ...]

    def of(self, whole: Tensors) -> torch.Tensor:
        return whole[self.key][self.where]

    def error(self, value: torch.Tensor, whole: Tensors) -> float:
        """Norm of the difference, relative to the norm of the whole parameter's tensor."""
        scale = whole[self.key].norm().clamp(min=1e-20)
        return ((value - self.of(whole)).norm() / scale).item()

    def span(self) -> tuple[int, ...]:
        """First index in each dimension, and the number of elements."""
        return (*(index.start for index in self.where), self.parameter.numel())


def parts(model: Any) -> Iterator[Part]:
    sharded = model.sharded_state_dict()
    for name, parameter in model.named_parameters():
        entry = sharded[name]
        assert entry.data is not None
        assert entry.data.shape == parameter.shape
        layers = entry.prepend_axis_num  # a checkpoint stacks a parameter's layers
        yield Part(
            name=name,
            parameter=parameter,
            key=f"{entry.key}{[*entry.global_offset[:layers]]}",
            shape=entry.global_shape[layers:],
            where=entry.global_slice()[layers:],
        )


def run_reference(design: Design) -> Outcome:
    """One process, plain loops, plain AdamW; runs on a pool of one rank."""
    groups = model_parallel()
    model = build_model(transformer_config(), design, groups, first=True, last=True)
    losses, gradients = [], []
    for batch in make_batches():
        model.zero_grad()
        losses.append(reference_step(model, batch).item())
        gradients.append(_whole(model, lambda parameter: parameter.grad))
    weights = _whole(model, lambda parameter: parameter.data)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=LEARNING_RATE, eps=EPSILON, betas=(0.9, 0.99), weight_decay=0.0
    )
    norms, trained_losses = [], []
    for batch in make_batches():
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
        trained=_whole(model, lambda parameter: parameter.data),
    )


def run_gradients(layout: Layout, design: Design, reference: Outcome) -> Deviation:
    """Loss and gradients of every batch, with weights as they are; runs on every rank."""
    model, wrapped = _build(layout, design, reference.weights)
    losses: list[float] = []
    errors: dict[str, float] = {}
    covered: dict[str, set[tuple[Any, ...]]] = {}
    for batch, gradients in zip(make_batches(), reference.gradients, strict=True):
        wrapped.zero_grad_buffer()
        losses.append(_run_step(layout, wrapped, batch))
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
        losses.append(_run_step(layout, wrapped, batch))
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


def _build(layout: Layout, design: Design, weights: Tensors) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    groups = model_parallel(tp=layout.tp, pp=layout.pp)
    config = transformer_config(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        finalize_model_grads_func=finalize_model_grads,
        # What Megatron's training loop sets with the distributed optimizer: outputs of a
        # stage are freed once they are sent.
        deallocate_pipeline_outputs=True,
    )
    model = build_model(
        config,
        design,
        groups,
        first=parallel_state.is_pipeline_first_stage(),
        last=parallel_state.is_pipeline_last_stage(),
    )
    with torch.no_grad():
        for part in parts(model):
            part.parameter.copy_(part.of(weights))
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            use_distributed_optimizer=layout.distributed_optimizer,
            bucket_size=SMALL_BUCKET,
        ),
        model,
    )
    if layout.overlap_grad_reduce:
        config.no_sync_func = wrapped.no_sync
    return model, wrapped


def _run_step(layout: Layout, wrapped: Any, batch: list[Sample]) -> float:
    """Forward and backward of a global batch by Megatron's schedule; the loss on every rank."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    dp_rank = parallel_state.get_data_parallel_rank()
    chunks = [batch[i : i + MICRO_BATCH] for i in range(0, len(batch), MICRO_BATCH)]
    mine = chunks[dp_rank :: layout.dp]
    wrapped.train()
    reports = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(enumerate(mine)),
        model=[wrapped],
        num_microbatches=len(mine),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    total = torch.zeros(2)
    if parallel_state.is_pipeline_last_stage():
        total = torch.stack([report["sum and count"] for report in reports]).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return (total[0] / total[1]).item()


def _forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    from megatron.core.models.mimo.alignment import build_alignment_plan

    number, samples = next(data_iterator)
    ids_BS = torch.stack([sample.ids_S for sample in samples])
    mask_BS = torch.stack([sample.mask_S for sample in samples])
    media = {
        "images": {"vit": {"pixel_values": torch.cat([sample.images for sample in samples])}},
        "sounds": {"linear": {"waves": torch.cat([sample.sounds for sample in samples])}},
    }
    losses, mask_BS = model(
        input_ids=ids_BS,
        position_ids=torch.arange(SEQUENCE).expand_as(ids_BS),
        labels=torch.stack([sample.labels_S for sample in samples]),
        loss_mask=mask_BS,
        modality_inputs={
            name: inputs
            for name, inputs in media.items()
            if any(len(value) for encoder in inputs.values() for value in encoder.values())
        },
        # A plan in every other micro-batch: both ways have to give the same.
        alignment_plan=build_alignment_plan(ids_BS, PLACEHOLDERS) if number % 2 == 0 else None,
    )

    def sum_losses(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total, count = (losses_BS * mask_BS).sum(), mask_BS.sum()
        report = {"sum and count": torch.stack([total.detach(), count])}
        return total, count.to(torch.int32), report

    return losses, sum_losses


def _whole(model: Any, of: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Tensors:
    tensors = {}
    for part in parts(model):
        value = of(part.parameter)
        if value is not None:
            assert value.shape == part.shape, "the reference runs on one process"
            tensors[part.key] = value.clone()
    return tensors
