"""Compares our model, under a layout, with transformers': logits, loss, gradients, tokens.

Legend: B micro-batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.mimo.arguments.standalone import build_model, model_settings, process_groups
from megatron.mimo.checkpoints.slots import match_slots, model_slots
from megatron.mimo.checkpoints.weights import load_weights, make_parameter
from megatron.mimo.convert.reference import NEW_TOKENS, Expected
from megatron.mimo.inference import Generator, SamplingOptions
from megatron.mimo.models.common.family import sample_collator
from megatron.mimo.models.common.keys import KeyTable

__all__ = ["Comparison", "Difference", "compare_model"]


@dataclass(kw_only=True)
class Difference:
    """Of one gradient, over the parts that one rank holds.

    Attributes:
        squares: of the difference, summed.
        norm_squares: of transformers' gradient, summed.
    """

    squares: float
    norm_squares: float


@dataclass(kw_only=True)
class Comparison:
    """What one rank found.

    Attributes:
        logits: largest absolute differences of each micro-batch; empty but on the last stage.
        loss: mean over the label positions; None but on the last stage.
        gradients: by our parameter's name.
        answers: greedy tokens of each sample.
    """

    logits: list[float] = field(default_factory=list)
    loss: float | None = None
    gradients: dict[str, Difference] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)


def compare_model(
    family: Any,
    config: Any,
    checkpoint: Path,
    expected: Expected,
    *,
    tp_size: int,
    pp_size: int,
    changes: Mapping[str, object] | None = None,
) -> Comparison:
    """Load a checkpoint in fp32 and compare; every rank of the job takes part.

    All samples are one padded batch.

    Args:
        family: the model's.
        config: its configuration.
        checkpoint: ``iter_...`` or ``release`` folder.
        expected: what transformers computes.
        tp_size: tensor-parallel size.
        pp_size: pipeline-parallel size; both together are the number of processes.
        changes: of our model, as ``model_settings`` takes them.
    """
    found = Comparison()
    with process_groups(tp_size=tp_size, pp_size=pp_size) as device:
        settings = model_settings(family, config, tp_size=tp_size, pp_size=pp_size, changes=changes)
        model = build_model(family, config, settings, device=device)
        load_weights(model, checkpoint)
        longest = max(example["input_ids"].size(1) for example in expected.examples)
        length = (longest // tp_size + 5) * tp_size  # divisible, for sequence parallelism
        collate = sample_collator(family, config, seq_length=length, vocab_size=settings.tokens)
        samples = [family.sample(config, example) for example in expected.examples]
        generator = Generator(model, collate, vocab_size=settings.tokens)
        found.answers = generator(
            samples, SamplingOptions(max_new_tokens=NEW_TOKENS, rules=expected.rules)
        )
        batch = collate(samples)
        _step(model, _on(device, batch), expected, settings.tokens, found)
        found.gradients = _compare_gradients(model, family.keys(config), expected)
    return found


def _on(device: torch.device, value: Any) -> Any:
    """A nest of tensors on a device."""
    if isinstance(value, dict):
        return {key: _on(device, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_on(device, one) for one in value]
    return value.to(device) if hasattr(value, "to") else value


def _step(
    model: Any, batch: dict[str, Any], expected: Expected, tokens: int, found: Comparison
) -> None:
    """Forward and backward by Megatron's schedule; gradients end in ``main_grad``."""
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    count, length = batch["input_ids"].shape
    forward = partial(_forward, expected=expected, tokens=tokens, found=found)
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([batch]),
        model=wrapped,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=count,
        forward_only=False,
    )


def _forward(
    batches: Iterator[dict[str, Any]],
    model: Any,
    *,
    expected: Expected,
    tokens: int,
    found: Comparison,
) -> tuple[Tensor, Any]:
    batch = dict(next(batches))
    labels_BS = batch.pop("labels")
    output, mask_BS = model(**batch)
    groups = unwrap_model(model).pg_collection

    def sum_losses(logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits_BSV = gather_from_tensor_model_parallel_region(logits_BSV, group=groups.tp)
        logits_BSV = logits_BSV[..., :tokens]  # transformers does not pad it
        for logits_SV, wanted_LV in zip(logits_BSV.detach(), expected.logits, strict=True):
            difference = logits_SV[: len(wanted_LV)].cpu() - wanted_LV
            found.logits.append(difference.abs().max().item())
        losses_N = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
        total, count = (losses_N * mask_BS.flatten()).sum(), mask_BS.sum()
        found.loss = (total / count).item()
        return total, count.to(torch.int32), {}

    return output, sum_losses


def _compare_gradients(model: Any, table: KeyTable, expected: Expected) -> dict[str, Difference]:
    for parameter in model.parameters():  # the sharded state describes gradients as it does data
        if parameter.requires_grad:
            parameter.data.copy_(parameter.main_grad)
    trained = {one.data_ptr() for one in model.parameters() if one.requires_grad}
    gradients, table = table.laid_out(expected.gradients)
    wanted = {table.canonical(name): grad for name, grad in gradients.items()}
    wanted |= {copy: wanted[name] for name, copy in table.tied if name in wanted}
    differences = {}
    for slot, row in match_slots(model_slots(model), table):
        is_trained = slot.sharded.data.data_ptr() in trained
        if not is_trained and not wanted.keys() & set(row.hf):
            continue
        nothing = {
            name: torch.zeros(shape) for name, shape in table.hf_shapes(row, slot.shape).items()
        }
        whole = make_parameter(row, {name: wanted.get(name, nothing[name]) for name in row.hf})
        missing = slot.shape[0] - len(whole) if slot.may_be_padded else 0
        if missing > 0:  # the padding of the vocabulary is not trained
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        difference = Difference(squares=0.0, norm_squares=whole.double().square().sum().item())
        for piece in slot.pieces():
            assert piece.data is not None
            part = whole[piece.global_slice()[piece.prepend_axis_num :]]
            ours = piece.data.cpu() if is_trained else torch.zeros(())
            difference.squares += (ours - part).double().square().sum().item()
        differences[slot.name] = difference
    return differences
