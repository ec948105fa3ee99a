"""The same model on ranks, by Megatron's schedules, from the same weights, in padded batches.

Legend: B micro-batch, S sequence, L tokens of one sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.distributed.models.expected import (
    BETAS,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    STEPS,
    WEIGHT_DECAY,
    Expected,
)
from tests.rank_pool import model_parallel

MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallelism; ``flags`` are further ones of ``pretrain_mimo.py``."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    flags: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Of one rank from transformers.

    Attributes:
        logits: largest absolute difference over all samples; None but on the last stage.
        gradients: norm of the difference relative to the parameter's, by our name.
        loss: as transformers' ``Expected.loss``.
    """

    logits: float | None
    gradients: dict[str, float]
    loss: float


def compare(name: str, layout: Layout, expected: Expected) -> Deviation:
    """Logits and gradients of one global batch; runs on every rank."""
    model, wrapped = _build(name, layout, expected)
    batches = _batches(name, layout, expected)
    loss, differences = _step(layout, expected, wrapped, batches)
    for parameter in model.parameters():  # where weights are compared, gradients are now
        if parameter.requires_grad:
            parameter.data.copy_(parameter.main_grad)
    return Deviation(
        logits=max(differences) if differences else None,
        gradients=_errors(name, model, expected),
        loss=loss,
    )


def train(name: str, layout: Layout, expected: Expected) -> list[float]:
    """Losses of steps of Megatron's optimizer; runs on every rank."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _, wrapped = _build(name, layout, expected)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
            clip_grad=CLIP,
        ),
        [wrapped],
    )
    for group in optimizer.param_groups:  # as the scheduler of a run does at every step
        group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
    losses = []
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(_step(layout, expected, wrapped, _batches(name, layout, expected))[0])
        optimizer.step()
    return losses


def _build(name: str, layout: Layout, expected: Expected) -> tuple[Any, Any]:
    """The rank's part of the model with transformers' weights, bare and ready for training."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.mimo.convert.load import load_hugging_face
    from megatron.mimo.models import load_family
    from megatron.mimo.models.standalone import build_model, model_arguments

    model_parallel(tp=layout.tp, pp=layout.pp)
    family = load_family(name)
    args = model_arguments(
        family, expected.config, tp_size=layout.tp, pp_size=layout.pp, flags=layout.flags
    )
    model = build_model(family, expected.config, args, device=torch.device("cpu"))
    load_hugging_face(model, expected.weights, family.keys(expected.config))
    model.model_type = ModelType.encoder_or_decoder  # as pretrain does
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.train()
    wrapped.zero_grad_buffer()
    return model, wrapped


def _batches(name: str, layout: Layout, expected: Expected) -> list[dict[str, Any]]:
    """This rank's micro-batches, padded to more than the longest sample."""
    from megatron.core import parallel_state
    from megatron.mimo.data import SampleCollator
    from megatron.mimo.models import load_family

    family = load_family(name)
    samples = [family.sample(expected.config, example) for example in expected.examples]
    media = family.media(expected.config)
    longest = max(len(sample.token_ids) for sample in samples)
    collator = SampleCollator(
        seq_length=(longest // 8 + 1) * 8,
        vocab_size=expected.config.get_text_config().vocab_size,
        pad_id=0,
        special_token_ids=media.special_token_ids,
        media_formats=media.formats,
        mrope=media.mrope,
    )
    groups = [
        list(range(first, first + MICRO_BATCH)) for first in range(0, len(samples), MICRO_BATCH)
    ]
    mine = groups[parallel_state.get_data_parallel_rank() :: layout.dp]
    return [
        {
            **collator([samples[index] for index in group]),
            "expected": [expected.logits[index] for index in group],
        }
        for group in mine
    ]


def _step(
    layout: Layout, expected: Expected, wrapped: Any, batches: Sequence[dict[str, Any]]
) -> tuple[float, list[float]]:
    """Forward and backward; the loss on every rank, and differences of logits on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    differences: list[float] = []
    vocab_size = expected.config.get_text_config().vocab_size
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward, differences=differences, vocab_size=vocab_size),
        data_iterator=iter(batches),
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=batches[0]["input_ids"].size(1),
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    total = torch.zeros(2)
    if parallel_state.is_pipeline_last_stage():
        total = torch.stack([report["sum and count"] for report in reports]).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return (total[0] / total[1]).item(), differences


def _forward(
    batches: Iterator[dict[str, Any]],
    model: Any,
    *,
    differences: list[float],
    vocab_size: int,
) -> tuple[Tensor, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batch = dict(next(batches))
    labels_BS, mask_BS = batch.pop("labels"), batch["loss_mask"]
    expected = batch.pop("expected")
    output, _ = model(**batch)

    def sum_losses(logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        logits_BSV = gather_from_tensor_model_parallel_region(logits_BSV, group=tp_group)
        logits_BSV = logits_BSV[..., :vocab_size]  # transformers does not pad the vocabulary
        for logits_SV, expected_LV in zip(logits_BSV, expected, strict=True):
            difference_LV = logits_SV[: len(expected_LV)].detach() - expected_LV
            differences.append(difference_LV.abs().max().item())
        losses_N = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
        total, count = (losses_N * mask_BS.flatten()).sum(), mask_BS.sum()
        report = {"sum and count": torch.stack([total.detach(), count])}
        return total, count.to(torch.int32), report

    return output, sum_losses


def _errors(name: str, model: Any, expected: Expected) -> dict[str, float]:
    """How far this rank's parameters, which hold gradients, are from transformers' gradients."""
    from megatron.mimo.convert.load import make_parameter
    from megatron.mimo.convert.match import match_names
    from megatron.mimo.convert.slots import match_slots, model_slots
    from megatron.mimo.models import load_family

    table = load_family(name).keys(expected.config)
    given = match_names(expected.weights.keys(), table, source="the reference").given
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    errors = {}
    for slot, row in match_slots(model_slots(model), table):
        if slot.sharded.data.data_ptr() not in trained:
            assert not any(given[key] in expected.gradients for key in row.hf), slot.name
            continue
        whole = make_parameter(row, {key: expected.gradients[given[key]] for key in row.hf})
        if len(whole) < slot.shape[0]:  # padding of the vocabulary is not trained
            whole = torch.cat(
                [whole, whole.new_zeros(slot.shape[0] - len(whole), *whole.shape[1:])]
            )
        assert whole.norm() > 0, f"nothing depends on {slot.name}"
        squares = 0.0
        for piece in slot.pieces():
            wanted = whole[piece.global_slice()[piece.prepend_axis_num :]]
            assert piece.data is not None
            assert piece.data.shape == wanted.shape, slot.name
            squares += (piece.data - wanted).square().sum().item()
        errors[slot.name] = squares**0.5 / whole.norm().item()
    return errors
