"""The loss that balances experts: transformers' over all layers, value and gradients, on ranks.

Legend: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.models.ranks import Layout, build_chunks, gradient_errors
from tests.distributed.models.test_language import EXPERTS, SMALL, text_family
from tests.distributed.schedule import SUM_AND_COUNT, run_schedule, wrap_plainly
from tests.rank_pool import RankPool

WEIGHT = 0.3
LENGTHS = (16, 5, 9, 12, 3, 16, 8, 11)  # two make a micro-batch
SEQUENCE = 16
SP = {"sequence_parallel": True}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
CASES = {
    "one": Layout(changes=MOE),
    "dp2-ep2-cp2": Layout(dp=2, cp=2, ep=2, changes=ALLTOALL),
    "tp2-pp2": Layout(tp=2, pp=2, etp=1, changes=SP | FULL),
    "pp2-vpp2": Layout(pp=2, vpp=2, changes=FULL),
    "pp4": Layout(pp=4),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Of transformers: the loss that is trained and the balance alone, each a mean."""

    config: Any
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    loss: float
    balance: float


def ids_and_padding() -> list[tuple[Tensor, Tensor]]:
    """Micro-batches: ids and bool padding, [2, S] each."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 509, (len(LENGTHS), SEQUENCE), generator=generator)
    padding = torch.arange(SEQUENCE) >= torch.tensor(LENGTHS)[:, None]
    return list(zip(ids.masked_fill(padding, 0).split(2), padding.split(2), strict=True))


def labels_of(ids_BS: Tensor, padding_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens, and where they count: few positions do, and other ones than of tokens."""
    labels_BS = ids_BS.roll(-1, dims=1)
    mask_BS = ~padding_BS.roll(-1, dims=1) & (labels_BS % 3 == 0)
    mask_BS[:, -1] = False
    return labels_BS, mask_BS.float()


def by_transformers() -> Reference:
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(
        **SMALL | EXPERTS,
        model_type="qwen3_moe",
        output_router_logits=True,
        router_aux_loss_coef=WEIGHT,
    )
    config.num_experts, config.num_hidden_layers, config.mlp_only_layers = 4, 4, [1]
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text, labels, balance, tokens = torch.zeros(()), 0.0, torch.zeros(()), 0
    for ids_BS, padding_BS in ids_and_padding():
        output = model(ids_BS, attention_mask=(~padding_BS).long())
        labels_BS, mask_BS = labels_of(ids_BS, padding_BS)
        losses_BS = torch.nn.functional.cross_entropy(
            output.logits.transpose(1, 2), labels_BS, reduction="none"
        )
        text, labels = text + (losses_BS * mask_BS).sum(), labels + mask_BS.sum().item()
        count = int((~padding_BS).sum())
        balance, tokens = balance + output.aux_loss * count, tokens + count
    loss = text / labels + WEIGHT * balance / tokens
    loss.backward()
    return Reference(
        config=config,
        weights={name: one.clone() for name, one in model.state_dict().items()},
        gradients={name: one.grad.clone() for name, one in model.named_parameters()},
        loss=loss.item(),
        balance=(balance / tokens).item(),
    )


def compare(
    layout: Layout, expected: Reference
) -> tuple[dict[str, float], float, dict[str, list[float]]]:
    """Relative errors of gradients, the loss, and sums and counts by name; runs on every rank."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.mimo.checkpoints.weights import load_hugging_face
    from megatron.mimo.training.losses import CountedBatches

    family, config = text_family(), expected.config
    chunks = build_chunks(family, config, layout)
    for chunk in chunks:
        load_hugging_face(chunk, expected.weights, family.keys(config))
    wrapped = [wrap_plainly(chunk) for chunk in chunks]
    mine = ids_and_padding()[parallel_state.get_data_parallel_rank() :: layout.dp]
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 8, 2, layout.dp)
    sums: dict[str, list[float]] = {}
    counted = CountedBatches({}, balanced=True)
    loss = run_schedule(
        wrapped,
        [_batch(*one) for one in mine],
        partial(_forward, counted=counted, sums=sums),
        seq_length=SEQUENCE,
        micro_batch_size=2,
    )
    table = family.keys(config)
    errors: dict[str, float] = {}
    for chunk in chunks:
        errors |= gradient_errors(chunk, table, expected.gradients)
    return errors, loss, sums


def _batch(ids_BS: Tensor, padding_BS: Tensor) -> dict[str, Any]:
    labels_BS, mask_BS = labels_of(ids_BS, padding_BS)
    return {
        "input_ids": ids_BS,
        "position_ids": torch.arange(SEQUENCE).expand(len(ids_BS), -1),
        "padding_mask": padding_BS,
        "labels": labels_BS,
        "loss_mask": mask_BS,
    }


def _forward(
    batches: Iterator[dict[str, Any]], model: Any, *, counted: Any, sums: dict[str, list[float]]
) -> tuple[Tensor, Any]:
    from megatron.core.models.mimo.model.language.heads import Losses
    from megatron.core.utils import unwrap_model
    from megatron.mimo.training.forward_step import sum_losses

    if not unwrap_model(model).has_further_losses:
        output, _ = model(**next(batches))
        return output, lambda _: pytest.fail("this is not the last stage")
    batch, counts = counted.next(batches)
    output, _ = model(**batch)
    assert isinstance(output, Losses)

    def total_of(losses: Losses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count, report = sum_losses(losses, counts)
        for name, both in report.items():
            known = sums.get(name, [0.0, 0.0])
            sums[name] = [old + new for old, new in zip(known, both.tolist(), strict=True)]
        return total, count, {SUM_AND_COUNT: torch.stack([total.detach(), count.float()])}

    return output, total_of


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Reference:
    (reference,) = ranks(1)(by_transformers)
    return reference


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(ranks: RankPool, expected: Reference, name: str) -> None:
    layout = CASES[name]
    balance = torch.zeros(2)
    for errors, loss, sums in ranks(layout.world_size)(compare, layout, expected):
        assert errors
        assert not {key: error for key, error in errors.items() if not error < 1e-5}
        assert loss == pytest.approx(expected.loss, rel=1e-6)
        balance += torch.tensor(sums.get("expert balance loss", [0.0, 0.0]))
    assert (balance[0] / balance[1]).item() == pytest.approx(expected.balance, rel=1e-6)


def round_trip(dtype: torch.dtype) -> float:
    """The largest error of sums and of their slopes through a message, relative to the largest."""
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
    from megatron.core.models.mimo.model.language.expert_balance import (
        BalancedPart,
        Counted,
        ExpertBalance,
    )

    part = BalancedPart(weight=1.0, layers=3, experts=7, best=2, is_first=False, is_last=False)
    padding_BS = torch.zeros(2, 3, dtype=torch.bool)
    tally = ExpertBalance(part).begin(ForwardInputs(padding_mask_BS=padding_BS), SequenceCut())
    assert tally is not None
    generator = torch.Generator().manual_seed(1)
    sums_2E = torch.rand(2, 7, generator=generator, requires_grad=True)
    slopes_2E = torch.rand(2, 7, generator=generator)
    counted = Counted(part=part, sums_2E=sums_2E, tokens=tally.tokens)
    hidden_SBH = torch.rand(3, 2, 8, generator=generator).to(dtype)
    message_M1H = counted.message(hidden_SBH)
    assert message_M1H.dtype == dtype
    assert torch.equal(tally.received(message_M1H).view(3, 2, 8), hidden_SBH)
    assert tally.arrived_2E is not None
    arrived_2E = tally.arrived_2E * tally.tokens
    (arrived_2E * slopes_2E).sum().backward()
    assert sums_2E.grad is not None
    return max(
        (arrived_2E - sums_2E).abs().max().item(), (sums_2E.grad - slopes_2E).abs().max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_cross_stages_in_float32_whatever_the_message_is(
    ranks: RankPool, dtype: torch.dtype
) -> None:
    (error,) = ranks(1)(round_trip, dtype)
    assert error < 1e-6
