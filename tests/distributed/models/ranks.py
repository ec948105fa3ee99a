"""The same model on ranks, by Megatron's schedules, from the same weights, in padded batches.

Legend: B micro-batch, S sequence, L tokens of one sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
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
    Tensors,
)
from tests.distributed.schedule import SUM_AND_COUNT, Sizes, run_schedule, wrap_plainly
from tests.rank_pool import model_parallel

MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Layout(Sizes):
    """Sizes of the parallelism, of experts too; ``changes`` are further arguments of the model.

    With ``vpp`` each pipeline stage has as many chunks, which run interleaved.
    """

    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    changes: Mapping[str, object] = field(default_factory=dict, hash=False)


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
    from megatron.mimo.models import load_family

    models, wrapped = _build(name, layout, expected)
    batches = make_batches(name, layout, expected)
    loss, differences = run_step(layout, expected, wrapped, batches)
    table = load_family(name).keys(expected.config)
    gradients = {}
    for number, model in enumerate(models):
        errors = gradient_errors(model, table, expected.gradients)
        gradients |= {f"{key} of chunk {number}" if number else key: errors[key] for key in errors}
    return Deviation(
        logits=max(differences) if differences else None, gradients=gradients, loss=loss
    )


def train(name: str, layout: Layout, expected: Expected) -> list[float]:
    """Losses of steps of Megatron's optimizer; runs on every rank."""
    trainer = Trainer(name, layout, expected)
    return [trainer.step() for _ in range(STEPS)]


class Trainer:
    """The rank's part of the model with transformers' weights, and Megatron's optimizer of it.

    Attributes:
        model: bare.
        optimizer: as ``compute_expected`` has it.
    """

    def __init__(self, name: str, layout: Layout, expected: Expected) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        (self.model,), (self._wrapped,) = _build(name, layout, expected)
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPSILON,
                weight_decay=WEIGHT_DECAY,
                clip_grad=CLIP,
            ),
            [self._wrapped],
        )
        for group in self.optimizer.param_groups:  # as the scheduler of a run does at every step
            group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
        self._batch = (name, layout, expected)

    def step(self) -> float:
        """One step on all examples; the loss before it."""
        _, layout, expected = self._batch
        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = make_batches(*self._batch)
        loss, _ = run_step(layout, expected, [self._wrapped], batches, own_loss=True)
        self.optimizer.step()
        return loss


def waits(name: str, layout: Layout) -> list[dict[str, int]]:
    """What waits for the device in forward and backward, padded and packed; runs on every rank."""
    from megatron.core.models.mimo.partition.packing import packed_params
    from megatron.core.models.mimo.partition.utils import sequence_cut
    from megatron.mimo.backend.host_sync import HostSyncCounter
    from megatron.mimo.models import load_family

    family = load_family(name)
    config = family.tiny()
    (model,) = build_chunks(family, config, layout)
    generator = torch.Generator().manual_seed(3)
    samples = [family.sample(config, family.example(config, generator)) for _ in range(2)]
    found = []
    for collate in (_collator(family, config, samples), _packer(family, config, samples, layout)):
        batch = collate(samples)
        if model.partition_adapter is not None:  # as the training layer does, on the host
            packed = packed_params(batch.get("packing_kwargs"), cp_size=layout.cp)
            cut = sequence_cut(model.partition_adapter, packed)
            batch["alignment_plan"] = cut.share_of_plan(batch["alignment_plan"])
        with HostSyncCounter() as counter:
            losses_BS, mask_BS = model(**batch)
            (losses_BS * mask_BS).sum().backward()
        found.append(dict(counter.counts))
    return found


def _build(name: str, layout: Layout, expected: Expected) -> tuple[list[Any], list[Any]]:
    """The rank's chunks of the model with transformers' weights, bare and ready for training."""
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.models import load_family

    family = load_family(name)
    models = build_chunks(family, expected.config, layout)
    for model in models:
        load_hugging_face(model, expected.weights, family.keys(expected.config))
    return models, [wrap_plainly(model) for model in models]


def build_chunks(family: Any, config: Any, layout: Layout) -> list[Any]:
    """This rank's chunks of the model, in evaluation mode; one without ``vpp``."""
    from megatron.core import parallel_state
    from megatron.core.models.mimo import MimoModel
    from megatron.mimo.arguments.standalone import build_model, model_settings
    from megatron.mimo.models.common.place import Place, Places

    groups = model_parallel(
        tp=layout.tp, pp=layout.pp, cp=layout.cp, ep=layout.ep, etp=layout.etp, vpp=layout.vpp
    )
    changes = {
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "overlap_p2p_comm": layout.vpp is not None,  # as a run has both
        "batch_p2p_comm": layout.vpp is None,
        **layout.changes,
    }
    settings = model_settings(family, config, tp_size=layout.tp, pp_size=layout.pp, changes=changes)
    if layout.vpp is None:
        return [build_model(family, config, settings, device=torch.device("cpu"))]
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    chunks = []
    for number in range(layout.vpp):
        place = Place(
            groups=groups,
            is_first_stage=first and number == 0,
            is_last_stage=last and number == layout.vpp - 1,
            chunk=number,
        )
        built = family.build(config, settings, Places(language=place))
        model = MimoModel(built, cp_group=groups.cp, tp_group=groups.tp).eval()
        model.pg_collection, model.vp_stage = groups, number  # as pretrain does
        chunks.append(model)
    return chunks


def collating(family: Any, config: Any) -> dict[str, Any]:
    """What a collator of the family's samples is made with, but for the length of a row."""
    media = family.media(config)
    return {
        "vocab_size": config.get_text_config().vocab_size,
        "pad_id": 0,
        "special_token_ids": media.special_token_ids,
        "media_formats": media.formats,
        "mrope": media.mrope,
        "span_modalities": media.spans,
    }


def _collator(family: Any, config: Any, samples: Sequence[Any]) -> Any:
    """Pads to more than the longest sample."""
    from megatron.mimo.data import SampleCollator

    longest = max(len(sample.token_ids) for sample in samples)
    return SampleCollator(seq_length=(longest // 8 + 1) * 8, **collating(family, config))


def _packer(family: Any, config: Any, samples: Sequence[Any], layout: Layout) -> Any:
    """Puts all samples into one row."""
    from megatron.mimo.data import PackingCollator

    unit = 8 * layout.cp
    row = unit * (sum(len(one.token_ids) // unit + 1 for one in samples) + 1)
    return PackingCollator(seq_length=row, cp_size=layout.cp, **collating(family, config))


def make_batches(name: str, layout: Layout, expected: Expected) -> list[dict[str, Any]]:
    """This rank's micro-batches."""
    from megatron.core import parallel_state
    from megatron.mimo.models import load_family

    family = load_family(name)
    samples = [family.sample(expected.config, example) for example in expected.examples]
    collator = _collator(family, expected.config, samples)
    groups = [
        list(range(first, first + MICRO_BATCH)) for first in range(0, len(samples), MICRO_BATCH)
    ]
    mine = groups[parallel_state.get_data_parallel_rank() :: layout.dp]
    batches = []
    for group in mine:
        batch = collator([samples[index] for index in group])
        shape_BVS = (len(group), expected.logits[0].size(1), collator.seq_length)
        batch["expected"] = torch.full(shape_BVS, float("nan"))  # nothing is said of padding
        for place, index in enumerate(group):
            logits_LV = expected.logits[index]
            batch["expected"][place, :, : len(logits_LV)] = logits_LV.T
        batches.append(batch)
    return batches


def run_step(
    layout: Layout,
    expected: Expected,
    wrapped: Sequence[Any],
    batches: Sequence[dict[str, Any]],
    *,
    own_loss: bool = False,
) -> tuple[float, list[float]]:
    """Forward and backward; the loss on every rank, and differences of logits on the last stage.

    Args:
        own_loss: use the losses that the model computes in training, and compare no logits.
    """
    differences: list[float] = []
    vocab_size = expected.config.get_text_config().vocab_size
    loss = run_schedule(
        wrapped,
        batches,
        _forward_with_labels
        if own_loss
        else partial(_forward, differences=differences, vocab_size=vocab_size),
        seq_length=batches[0]["input_ids"].size(1),
        micro_batch_size=MICRO_BATCH,
    )
    return loss, differences


def _forward_with_labels(batches: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
    from megatron.mimo.training.forward_step import sum_loss

    batch = dict(next(batches))
    del batch["expected"]
    output, mask_BS = model(**batch)

    def sum_losses(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count, report = sum_loss(mask_BS, losses_BS)
        return total, count, {SUM_AND_COUNT: report["lm loss"]}

    return output, sum_losses


def _forward(
    batches: Iterator[dict[str, Any]],
    model: Any,
    *,
    differences: list[float],
    vocab_size: int,
) -> tuple[Tensor, Any]:
    from megatron.core import parallel_state
    from megatron.core.models.mimo.partition.utils import sequence_cut
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model

    batch = dict(next(batches))
    labels_BS, expected_BVS = batch.pop("labels"), batch.pop("expected")
    output, mask_BS = model(**batch)
    cut = sequence_cut(unwrap_model(model).partition_adapter, None)
    labels_BS, expected_BVS = cut.context_share(labels_BS), cut.context_share(expected_BVS)
    expected_BSV = expected_BVS.transpose(1, 2)

    def sum_losses(logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        logits_BSV = gather_from_tensor_model_parallel_region(logits_BSV, group=tp_group)
        logits_BSV = logits_BSV[..., :vocab_size]  # transformers does not pad the vocabulary
        difference_BSV = (logits_BSV.detach() - expected_BSV).where(expected_BSV.isfinite(), 0)
        differences.append(difference_BSV.abs().max().item())
        losses_N = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
        total, count = (losses_N * mask_BS.flatten()).sum(), mask_BS.sum()
        report = {SUM_AND_COUNT: torch.stack([total.detach(), count])}
        return total, count.to(torch.int32), report

    return output, sum_losses


def gradient_errors(model: Any, table: Any, gradients: Tensors) -> dict[str, float]:
    """How far the gradients in ``main_grad``, or ``grad``, are from transformers'.

    Parameters hold their gradients afterwards.

    Args:
        model: this rank's part.
        table: a ``KeyTable`` of it.
        gradients: by Hugging Face's name, of every parameter that the loss depends on.

    Returns:
        Norm of the difference relative to the whole gradient's, by our name.
    """
    from megatron.mimo.checkpoints.slots import match_slots, model_slots
    from megatron.mimo.checkpoints.weights import make_parameter

    trained = set()
    for parameter in model.parameters():  # the sharded state describes gradients as it does data
        if parameter.requires_grad:
            trained.add(parameter.data_ptr())
            parameter.data.copy_(getattr(parameter, "main_grad", parameter.grad))
    gradients, table = table.laid_out(gradients)
    wanted = {table.canonical(name): gradient for name, gradient in gradients.items()}
    wanted |= {copy: wanted[name] for name, copy in table.tied if name in wanted}
    errors = {}
    for slot, row in match_slots(model_slots(model), table):
        if slot.sharded.data.data_ptr() not in trained:
            assert not wanted.keys() & set(row.hf), slot.name
            continue
        whole = make_parameter(row, {name: wanted[name] for name in row.hf})
        if len(whole) < slot.shape[0]:  # padding of the vocabulary is not trained
            missing = slot.shape[0] - len(whole)
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        assert whole.norm() > 0, f"nothing depends on {slot.name}"
        squares = 0.0
        for piece in slot.pieces():
            expected = whole[piece.global_slice()[piece.prepend_axis_num :]]
            assert piece.data is not None
            assert piece.data.shape == expected.shape, slot.name
            squares += (piece.data - expected).square().sum().item()
        errors[slot.name] = squares**0.5 / whole.norm().item()
    return errors
