"""Two heads, their targets, and all losses of a model with them: by plain loops, and by layouts.

Legend: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.distributed.core.layouts import (
    Layout,
    build_chunks,
    copy_weights,
    model_inputs,
    wrap_chunks,
)
from tests.distributed.core.reference import (
    HIDDEN,
    SEQUENCE,
    Design,
    Sample,
    build_model,
    make_batches,
    sample_losses,
    transformer_config,
)
from tests.distributed.core.whole import Tensors, parts, whole
from tests.rank_pool import model_parallel

DESIGN = Design(heads=True)
KINDS = 5
WEIGHTS = {"text": 1.0, "kind": 0.5, "size": 2.0}


class KindHead(nn.Module):
    """Which of some kinds a token is of; counts where the targets' mask says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, KINDS)

    def forward(self, inputs: Any) -> torch.Tensor:
        scores = self.linear(inputs.hidden_SBH).permute(1, 2, 0)
        return F.cross_entropy(scores, inputs.targets["kinds"], reduction="none")


class SizeHead(nn.Module):
    """Two numbers of each token; counts where the text's loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, 2)

    def forward(self, inputs: Any) -> torch.Tensor:
        sizes_BS2 = self.linear(inputs.hidden_SBH).transpose(0, 1)
        return (sizes_BS2 - inputs.targets["sizes"]).square().sum(dim=-1)


def head_specs() -> dict[str, Any]:
    from megatron.core.models.mimo.config import HeadSpec
    from megatron.core.transformer.spec_utils import ModuleSpec

    return {
        "kind": HeadSpec(module=ModuleSpec(module=KindHead), weight=WEIGHTS["kind"]),
        "size": HeadSpec(module=ModuleSpec(module=SizeHead), weight=WEIGHTS["size"]),
    }


def targets_of(ids: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Targets of both heads for ids of any shape."""
    sizes = torch.stack([ids / 32, (ids * ids % 7) / 7], dim=-1)
    return {"kind": {"kinds": ids % KINDS, "mask": ids % 3 == 0}, "size": {"sizes": sizes}}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Each loss and every gradient of each global batch.

    Attributes:
        weights: whole, of one process; {} elsewhere.
        losses: by name, each divided by its own number of positions.
        gradients: of the trained parameters' parts: what the whole is indexed by, and the part.
    """

    weights: Tensors
    losses: list[dict[str, float]]
    gradients: list[dict[str, tuple[Any, torch.Tensor]]]


def by_loops(frozen: Sequence[str] = ()) -> Trained:
    """Plain loops over samples on one process."""
    model = build_model(transformer_config(), DESIGN, model_parallel(), first=True, last=True)
    model.freeze(*frozen)
    losses, gradients = [], []
    for batch in make_batches():
        model.zero_grad()
        sums = dict.fromkeys(WEIGHTS, torch.zeros(()))
        counts = dict.fromkeys(WEIGHTS, 0.0)
        for sample in batch:
            for name, (loss_S, mask_S) in _sample(model, sample).items():
                sums[name] = sums[name] + (loss_S * mask_S).sum()
                counts[name] += float(mask_S.sum())
        quotients = {name: total / counts[name] for name, total in sums.items()}
        torch.stack([quotients[name] * weight for name, weight in WEIGHTS.items()]).sum().backward()
        losses.append({name: quotient.item() for name, quotient in quotients.items()})
        found = whole(model, lambda parameter: parameter.grad)
        gradients.append({key: (..., gradient) for key, gradient in found.items()})
    weights = whole(model, lambda parameter: parameter.data)
    return Trained(weights=weights, losses=losses, gradients=gradients)


def _sample(model: Any, sample: Sample) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loss and mask [S] of each loss of one sample."""
    seen: list[torch.Tensor] = []
    hook = model.language_model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    text_S = sample_losses(model, sample)
    hook.remove()
    hidden_SH, targets = seen[0][:, 0], targets_of(sample.ids_S)
    scores = model.heads["kind"].linear(hidden_SH)
    kind_S = F.cross_entropy(scores, targets["kind"]["kinds"], reduction="none")
    off = model.heads["size"].linear(hidden_SH) - targets["size"]["sizes"]
    return {
        "text": (text_S, sample.mask_S),
        "kind": (kind_S, targets["kind"]["mask"].float()),
        "size": ((off * off).sum(dim=1), sample.mask_S),
    }


def by_layout(layout: Layout, weights: Tensors, frozen: Sequence[str] = ()) -> Trained:
    """Megatron's schedule, data parallelism and finalisation; runs on every rank."""
    groups = model_parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp)
    chunks = build_chunks(layout, DESIGN, groups)
    copy_weights(chunks, weights)
    chunks[0].freeze(*frozen)
    (wrapped,) = wrap_chunks(layout, DESIGN, chunks)
    losses, gradients = [], []
    for batch in make_batches():
        wrapped.zero_grad_buffer()
        losses.append(_step(layout, wrapped, batch))
        gradients.append(
            {
                part.key: (part.where, part.parameter.main_grad.clone())
                for part in parts(chunks[0])
                if part.parameter.requires_grad
            }
        )
    return Trained(weights={}, losses=losses, gradients=gradients)


def _step(layout: Layout, wrapped: Any, batch: list[Sample]) -> dict[str, float]:
    from megatron.core import parallel_state
    from megatron.core.models.mimo.model.language.heads import count_positions
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size = layout.micro_batch
    batches = [
        _inputs(batch[start : start + size], layout, plan=start % 4 == 0)
        for start in range(0, len(batch), size)
    ]
    numbers = [
        count_positions(one["labels"], one["loss_mask"], one["head_targets"], head_specs())
        for one in batches
    ]
    counts = {name: sum(float(number[name]) for number in numbers) for name in WEIGHTS}
    mine = batches[parallel_state.get_data_parallel_rank() :: layout.dp]
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, counts=counts),
        data_iterator=iter(mine),
        model=[wrapped],
        num_microbatches=len(mine),
        seq_length=SEQUENCE * size if layout.packed else SEQUENCE,
        micro_batch_size=1 if layout.packed else size,
        forward_only=False,
    )
    totals = torch.zeros(len(WEIGHTS), 2)
    if parallel_state.is_pipeline_last_stage():
        for report in reports:
            totals += torch.stack([report[name] for name in WEIGHTS])
    dist.all_reduce(
        totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
    assert totals[:, 1].tolist() == [counts[name] for name in WEIGHTS]
    return {
        name: float(total / count) for name, (total, count) in zip(WEIGHTS, totals, strict=True)
    }


def _inputs(samples: list[Sample], layout: Layout, *, plan: bool) -> dict[str, Any]:
    inputs = model_inputs(samples, layout, DESIGN, dtype=torch.float32, plan=plan)
    return inputs | {"head_targets": targets_of(inputs["input_ids"])}


def _forward_step(data_iterator: Any, model: Any, *, counts: dict[str, float]) -> Any:
    output, _ = model(**next(data_iterator))

    def weigh(losses: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        report = {
            name: torch.stack([loss.sum.detach(), loss.count]) for name, loss in losses.items()
        }
        return losses.total(counts), losses["text"].count.int(), report

    return output, weigh
