"""Losses of further heads: each loss and every gradient equal those of plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.distributed.core.heads import DESIGN, Trained, by_layout, by_loops, targets_of
from tests.distributed.core.layouts import Layout, model_inputs
from tests.distributed.core.reference import build_model, make_batches, transformer_config
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

TOLERANCE = 1e-5  # of the norm of each parameter's gradient, and of each loss

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
    "dp2-overlap": Layout(dp=2, overlap_grad_reduce=True),
    "tp2-sp-pp2": Layout(tp=2, pp=2, sequence_parallel=True),
    "tp2-sp-cp2-packed": Layout(tp=2, cp=2, sequence_parallel=True, packed=True),
}


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Trained:
    found: Trained = ranks(1)(by_loops)[0]
    return found


def compare(results: list[Trained], expected: Trained, *, unfrozen: str = "") -> None:
    seen = set()
    for rank, result in enumerate(results):
        for got, losses in zip(result.losses, expected.losses, strict=True):
            assert got == pytest.approx(losses, rel=TOLERANCE)
        for got_grads, gradients in zip(result.gradients, expected.gradients, strict=True):
            errors = {}
            for key, (where, gradient) in got_grads.items():
                whole = gradients[key][1]
                scale = whole.norm().item() or 1.0
                errors[key] = (gradient - whole[where]).norm().item() / scale
            wrong = {key: error for key, error in errors.items() if not error < TOLERANCE}
            assert not wrong, f"rank {rank}: relative errors {wrong}"
            seen |= set(got_grads)
    assert seen == {key for key in expected.gradients[0] if unfrozen in key}


@pytest.mark.parametrize(
    "name", some(LAYOUTS, "one", "cp2", "dp2-overlap", "tp2-sp-pp2", "tp2-sp-cp2-packed")
)
def test_equals_loops(ranks: RankPool, expected: Trained, name: str) -> None:
    layout = LAYOUTS[name]
    compare(ranks(layout.world_size)(by_layout, layout, expected.weights), expected)


def test_heads_alone_are_trained(ranks: RankPool, expected: Trained) -> None:
    layout, frozen = Layout(tp=2, pp=2, sequence_parallel=True), ("language", "images", "sounds")
    results = ranks(4)(by_layout, layout, expected.weights, frozen)
    compare(results, expected, unfrozen="heads.")


def contract() -> None:
    from megatron.core.models.mimo import MimoModelConfig, get_mimo_optimizer
    from megatron.core.models.mimo.config import HeadSpec
    from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
    from megatron.core.models.mimo.model.language.heads import Losses
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec

    model = build_model(transformer_config(), DESIGN, model_parallel(), first=True, last=True)
    assert {"heads.kind.linear.weight", "heads.size.linear.bias"} <= set(model.state_dict())
    batch = model_inputs(make_batches()[0][:2], Layout(), DESIGN, dtype=torch.float32, plan=True)
    targets = targets_of(batch["input_ids"])
    losses, mask_BS = model(**batch, head_targets=targets)
    assert isinstance(losses, Losses)
    assert list(losses) == ["text", "kind", "size"]
    assert torch.equal(mask_BS, batch["loss_mask"])
    assert losses["kind"].count == targets["kind"]["mask"].sum()
    assert losses["size"].count == losses["text"].count == mask_BS.sum()
    assert all(loss.sum.dtype == torch.float32 and loss.sum.dim() == 0 for loss in losses.values())
    without = losses.total({"text": 4.0, "kind": 0.0, "size": 8.0})  # no kind in the global batch
    assert without.item() == pytest.approx(
        (losses["text"].sum + 0.5 * 4 * losses["kind"].sum + 2 * 0.5 * losses["size"].sum).item()
    )
    logits_BSV, _ = model(**(batch | {"labels": None}), head_targets=targets)
    assert logits_BSV.dim() == 3
    for wrong, message in (
        ({"other": {}}, r"name 'other', but the model has the heads \['kind', 'size'\]"),
        ({"size": {"sizes": torch.zeros(1, 3)}}, r"\['size'\]\['sizes'\] has shape \[1, 3\]"),
        ({"size": {"sizes": [1]}}, r"\['sizes'\] is list; expected a tensor"),
    ):
        with pytest.raises(InputError, match=message):
            model(**batch, head_targets=wrong)
    model.heads["size"].forward = lambda inputs: inputs.hidden_SBH
    with pytest.raises(InputError, match=r"head 'size' gave .* at every position"):
        model(**batch, head_targets=targets)
    with pytest.raises(ConfigError, match=r"'heads.other': no such part.*heads.kind"):
        model.freeze("heads.other")
    with pytest.raises(UnsupportedError, match=r"leaves out the heads \['kind', 'size'\]"):
        get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=1.0))
    spec = HeadSpec(module=ModuleSpec(module=torch.nn.Linear))
    for heads, message in (
        ({"text": spec}, "a head cannot be called 'text'"),
        ({"a": HeadSpec(module=spec.module, weight=math.inf)}, "a finite weight"),
        ({"a": spec.module}, "expected a HeadSpec"),
    ):
        with pytest.raises(ConfigError, match=message):
            MimoModelConfig(spec.module, heads=heads)


def in_half_precision() -> None:
    from megatron.core.models.mimo.model.language.heads import Losses
    from megatron.core.transformer.module import Float16Module

    design = replace(DESIGN, bf16=True)
    config = transformer_config(design)
    model = build_model(config, design, model_parallel(), first=True, last=True)
    batch = model_inputs(make_batches()[0][:2], Layout(), design, dtype=torch.bfloat16, plan=True)
    losses, _ = Float16Module(config, model)(**batch, head_targets=targets_of(batch["input_ids"]))
    assert isinstance(losses, Losses)
    assert {loss.sum.dtype for loss in losses.values()} == {torch.float32}
    losses.total({"text": 1.0, "kind": 1.0, "size": 1.0}).backward()
    assert all(parameter.grad.any() for parameter in model.heads.parameters())


def test_losses_pass_through_the_half_precision_wrapper(ranks: RankPool) -> None:
    ranks(1)(in_half_precision)


def test_contract(ranks: RankPool) -> None:
    ranks(1)(contract)
