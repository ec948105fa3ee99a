"""What runs on the ranks: the one-process runs, and cells compared with them.

Each cell trains three steps with Megatron's schedule, wrappers and optimizer. Compared are the loss
of every step, every parameter's gradient of the first, every norm, and the weights at the end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.core.grids import GridLayout, language_groups
from tests.distributed.core.layouts import (
    CLIP,
    EPSILON,
    LEARNING_RATE,
    Layout,
    build_chunks,
    copy_weights,
    run_step,
    wrap_chunks,
)
from tests.distributed.core.reference import (
    Design,
    Sample,
    build_model,
    make_batches,
    sample_losses,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, parts, whole
from tests.rank_pool import model_parallel


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of one process."""

    weights: Tensors
    gradients: Tensors
    losses: list[float]
    norms: list[float]
    trained: Tensors


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one rank of a cell: relative errors, and which elements it compared.

    Attributes:
        failure: a traceback; the rest is empty then.
        seconds: from the first group made to the last comparison.
    """

    gradients: dict[str, float]
    trained: dict[str, float]
    losses: list[float]
    norms: list[float]
    covered: dict[str, set[tuple[Any, ...]]]
    seconds: float
    failure: str = ""


BIAS = 0.05  # standard deviation of the biases that a run begins with


def run_references(designs: list[Design]) -> list[Expected]:
    """``run_reference`` of each."""
    groups = model_parallel()
    return [run_reference(design, groups) for design in designs]


def run_reference(design: Design, groups: Any, moved: int = 0) -> Expected:
    """One process, plain loops over tokens, plain AdamW on fp32 weights.

    Args:
        design: what is run.
        groups: of this rank alone.
        moved: a seed, by which weights in bf16 are first moved by at most a rounding each; 0
            leaves them.
    """
    torch.manual_seed(0)
    config = transformer_config(design)
    model = build_model(config, design, groups, first=True, last=True)
    if design.bf16:
        model.bfloat16()
        if moved:
            _move_by_a_rounding(model, moved)
    else:
        _move_biases(model)
    weights = whole(model, lambda parameter: parameter.data)
    main = {
        parameter: parameter.detach().float().clone()
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(
        main.values(), lr=LEARNING_RATE, eps=EPSILON, betas=(0.9, 0.99), weight_decay=0.0
    )
    first: Tensors = {}
    losses, norms = [], []
    for batch in make_batches(design):
        loss, gradients = _sum_gradients(model, batch, design)
        losses.append(loss)
        first = first or whole(model, gradients.get)
        for parameter, weight in main.items():
            weight.grad = gradients[parameter]
        norms.append(torch.nn.utils.clip_grad_norm_(main.values(), CLIP).item())
        optimizer.step()
        with torch.no_grad():
            for parameter, weight in main.items():
                parameter.copy_(weight)
    trained = whole(model, lambda parameter: parameter.data)
    return Expected(weights=weights, gradients=first, losses=losses, norms=norms, trained=trained)


def _move_biases(model: Any) -> None:
    """Away from 0: a bias would hold nothing but what Adam has divided, a few digits of fp32.

    And the decay of linear layers slower: of a fast one the gradient is a rest of large numbers.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=BIAS)
            elif name.endswith("A_log"):
                parameter.sub_(2.0)


def _move_by_a_rounding(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            share = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.mul_(1 + share.bfloat16() * torch.finfo(torch.bfloat16).eps / 2)


def _sum_gradients(
    model: Any, batch: list[Sample], design: Design
) -> tuple[float, dict[torch.nn.Parameter, torch.Tensor]]:
    """Loss and gradients of a batch, sample by sample, accumulated in fp32."""
    labels = sum(sample.mask_S.sum() for sample in batch)
    gradients = {
        parameter: torch.zeros(parameter.shape)
        for parameter in model.parameters()
        if parameter.requires_grad
    }
    total = 0.0
    for sample in batch:
        model.zero_grad()
        losses_S = sample_losses(model, sample, spans=design.spans)
        loss = (losses_S * sample.mask_S).sum() / labels
        if loss.requires_grad:  # not where a sample meets frozen parts only
            loss.backward()
        total += loss.item()
        for parameter, gradient in gradients.items():
            if parameter.grad is not None:
                gradient += parameter.grad.float()
    return total, gradients


def run_cells(cells: list[tuple[Layout, Design, Expected]]) -> list[Seen]:
    """Cells of one world size, one after the other; the first that fails ends them.

    A rank that failed leaves the others in a collective, so the cells after it need a new fork.
    """
    from megatron.core import parallel_state

    seen: list[Seen] = []
    sizes: Any = None
    groups: Any = None
    for layout, design, expected in cells:
        start = time.perf_counter()
        asked = layout.group_sizes
        if asked != sizes:
            if sizes is not None:
                dist.barrier()  # nobody destroys a group that another still uses
                parallel_state.destroy_model_parallel()
            groups = language_groups(layout)
            sizes = asked
        seen.append(_run_cell(layout, design, expected, groups, start))
    return seen


def _run_cell(
    layout: Layout, design: Design, expected: Expected, groups: Any, start: float
) -> Seen:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    if isinstance(layout, GridLayout):
        from tests.matrix.grid_ranks import run_grid_cell

        return run_grid_cell(layout, design, expected, groups, start)
    chunks = build_chunks(layout, design, groups)
    copy_weights(chunks, expected.weights)
    wrapped = wrap_chunks(layout, design, chunks)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_beta1=0.9,
            adam_beta2=0.99,
            adam_eps=EPSILON,
            weight_decay=0.0,
            clip_grad=CLIP,
            bf16=design.bf16,
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        wrapped,
    )
    gradients: dict[str, float] = {}
    losses, norms = [], []
    for step, batch in enumerate(make_batches(design)):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run_step(layout, design, wrapped, batch))
        if step == 0:
            if layout.distributed_optimizer:
                gather_gradients(wrapped)
            gradients = _gradient_errors(chunks, expected.gradients)
        success, norm, _ = optimizer.step()
        assert success
        norms.append(float(norm))
    if layout.overlap_param_gather:
        for chunk in wrapped:
            chunk.disable_forward_pre_hook()
    trained: dict[str, float] = {}
    covered: dict[str, set[tuple[Any, ...]]] = {}
    for number, chunk in enumerate(chunks):
        for part in parts(chunk):
            trained[f"{number}:{part.name}"] = part.error(part.parameter.data, expected.trained)
            covered.setdefault(part.key, set()).add(part.span())
    return Seen(
        gradients=gradients,
        trained=trained,
        losses=losses,
        norms=norms,
        covered=covered,
        seconds=time.perf_counter() - start,
    )


def _gradient_errors(chunks: list[Any], gradients: Tensors) -> dict[str, float]:
    errors = {}
    for number, chunk in enumerate(chunks):
        for part in parts(chunk):
            assert part.parameter.requires_grad == (part.key in gradients), part.name
            if part.parameter.requires_grad:
                errors[f"{number}:{part.name}"] = part.error(part.parameter.main_grad, gradients)
    return errors


def gather_gradients(wrapped: list[Any]) -> None:
    """Completes the gradients that the distributed optimizer leaves in shards, in place."""
    for chunk in wrapped:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                size = bucket.grad_data.numel() // ranks.size()
                mine = bucket.grad_data[ranks.rank() * size :][:size].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)
