"""Levels of encoder rows (deepstack): a plain loop on one process, and layouts equal to it.

The toy language model adds level l to the output of its layer l; see ``leveled_language_model``.
Legend: S sequence, B micro-batch, H hidden, N rows of the modality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.distributed.core.split_model import (
    HIDDEN,
    IMAGE,
    Cell,
    Result,
    build,
    leveled_language_model,
    micro_batches,
    run,
)
from tests.rank_pool import RankPool, model_parallel
from tests.tiers import some

TOLERANCE = 1e-5  # of the norm of each parameter's gradient, and of the loss

CELLS = {
    "tp2": Cell(tp=2, encoder="levels", split="never"),
    "tp2-sp": Cell(tp=2, sequence_parallel=True, encoder="levels", split="never"),
    "cp2": Cell(cp=2, encoder="levels", split="never"),
    "tp2-split": Cell(tp=2, encoder="levels"),
    "cp2-split": Cell(cp=2, encoder="levels"),
    "tp2-sp-cp2-split": Cell(tp=2, cp=2, sequence_parallel=True, encoder="levels"),
    "dp2-overlap": Cell(dp=2, overlap=True, encoder="levels"),
    "tp2-sp-dp2-overlap-split": Cell(
        tp=2, dp=2, sequence_parallel=True, overlap=True, encoder="levels"
    ),
    "cp2-frozen-encoder": Cell(cp=2, encoder="levels", frozen=("images.encoders",)),
    "tp2-sp-frozen-images": Cell(
        tp=2, sequence_parallel=True, encoder="levels", frozen=("images",)
    ),
    "tp2-sp-cp2-split-packed": Cell(
        tp=2, cp=2, sequence_parallel=True, encoder="levels", packed=True
    ),
}


@dataclass(frozen=True)
class LoopRows:
    """A level that a loop over tokens adds, in place of ``LevelRows``."""

    ids_BS: torch.Tensor
    rows_NH: torch.Tensor

    def add_to(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        rows = iter(self.rows_NH)
        samples = [
            torch.stack(
                [
                    state_H + next(rows) if token == IMAGE else state_H
                    for token, state_H in zip(ids, hidden_SH, strict=True)
                ]
            )
            for ids, hidden_SH in zip(self.ids_BS.tolist(), hidden_SBH.unbind(1), strict=True)
        ]
        return torch.stack(samples, dim=1)


def plain_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of losses of a micro-batch, rows and levels put in their places one by one."""
    ids_BS, language = batch["input_ids"], model.language_model
    table_VH = language.embedding.word_embeddings.weight
    rows: list[torch.Tensor] = []
    level_rows: tuple[LoopRows, ...] = ()
    inputs = batch["modality_inputs"].get("images")
    if inputs:
        images = model.modality_submodules["images"]
        encoded = images.encoders["encoder"](**inputs["encoder"])
        rows = [*images.input_projections[0](encoded.rows_NH)]
        level_rows = tuple(
            LoopRows(ids_BS, projection(level_NH))
            for projection, level_NH in zip(images.level_projections, encoded.levels, strict=True)
        )
    embedded = [
        torch.stack([rows.pop(0) if token == IMAGE else table_VH[token] for token in ids])
        for ids in ids_BS.tolist()
    ]
    losses_BS = language(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=torch.stack(embedded, dim=1),
        labels=batch["labels"],
        level_rows=level_rows,
    )
    total: torch.Tensor = (losses_BS * batch["loss_mask"]).sum()
    return total


def compare_with_a_loop() -> dict[str, float]:
    """Relative distance of every gradient of every micro-batch from that of the loop."""
    torch.manual_seed(5)
    model = build(Cell(encoder="levels"), model_parallel())
    errors: dict[str, float] = {}
    for batch in micro_batches("levels"):
        gradients = []
        for total in (plain_loss(model, batch), (model(**batch)[0] * batch["loss_mask"]).sum()):
            model.zero_grad()
            total.backward()
            parameters = dict(model.named_parameters())
            gradients.append(
                {
                    name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for name, p in parameters.items()
                }
            )
        expected, got = gradients
        for name, gradient in expected.items():
            scale = gradient.norm().item() or 1.0
            error = (got[name] - gradient).norm().item() / scale
            errors[name] = max(errors.get(name, 0.0), error)
        if batch["modality_inputs"]:
            assert all(expected[name].any() for name in expected if "images" in name)
    return errors


def test_levels_equal_a_loop_over_tokens(ranks: RankPool) -> None:
    (errors,) = ranks(1)(compare_with_a_loop)
    assert "modality_submodules.images.level_projections.1.weight" in errors
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


@pytest.fixture(scope="module")
def references(ranks: RankPool) -> dict[bool, Result]:
    """What one process gives, for separate and for packed sequences."""
    return {
        packed: ranks(1)(run, Cell(encoder="levels", packed=packed))[0] for packed in (False, True)
    }


@pytest.mark.parametrize(
    "name",
    some(
        CELLS,
        "tp2",
        "cp2-frozen-encoder",
        "tp2-sp-frozen-images",
        "tp2-sp-dp2-overlap-split",
        "tp2-sp-cp2-split-packed",
    ),
)
def test_equals_one_process(ranks: RankPool, references: dict[bool, Result], name: str) -> None:
    cell = CELLS[name]
    expected = references[cell.packed]
    for rank, result in enumerate(ranks(cell.world_size)(run, cell, expected.weights)):
        assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        frozen = {key for key in expected.gradients if key not in result.gradients}
        parts = {"images.encoders": "images.encoders.", "images": "images."}
        assert all(any(parts[part] in key for part in cell.frozen) for key in frozen)
        errors = {}
        for key, (where, gradient) in result.gradients.items():
            _, whole = expected.gradients[key]
            errors[key] = ((gradient - whole[where]).norm() / whole.norm()).item()
        wrong = {key: error for key, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: relative errors {wrong}"


def refusals() -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mimo import MimoModel
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
    from megatron.core.models.mimo.model.batch.forward_inputs import ForwardInputs
    from megatron.core.models.mimo.model.language.decoder_input import arrived_from_stage_before
    from megatron.core.models.mimo.model.language.refusals import refuse_untaken_levels
    from megatron.core.models.mimo.model.merging.level_route import LevelRoute

    groups = model_parallel()
    model = build(Cell(encoder="levels"), groups)
    config, batch = model.mimo_config, micro_batches("levels")[0]
    (spec,) = config.modality_submodules_spec.values()
    config.language_model_spec.module = GPTModel
    with pytest.raises(UnsupportedError, match=r"'images' give 2 levels .* GPTModel does not take"):
        MimoModel(config)
    config.language_model_spec.module = leveled_language_model()
    short = build(Cell(encoder="levels"), groups).language_model
    del short.decoder.layers[1:]
    with pytest.raises(UnsupportedError, match=r"first 2 decoder layers, .* holds 1; give the mod"):
        refuse_untaken_levels(model.modality_submodules, short, LevelRoute())
    layers = config.language_model_spec.params["config"]
    layers.num_layers = 1
    with pytest.raises(UnsupportedError, match=r"first 2 decoder layers, .* has 1; give it more"):
        MimoModel(config)
    layers.num_layers = 2
    del spec.submodules["level_projections"][1]
    with pytest.raises(ConfigError, match="has 1 level_projections for 2 levels"):
        MimoModel(config)
    model.align_embeddings_by_token_positions = lambda *_: None
    with pytest.raises(UnsupportedError, match=r"\['images'\] give levels .* a script merges"):
        model(**batch)
    model.modality_submodules["images"].encoders["encoder"].num_levels = 1
    with pytest.raises(InputError, match="gave 2 levels of its rows, and its num_levels is 1"):
        model(**batch)
    model.level_route = LevelRoute(levels={"images": 2}, first=1, is_first=False, crosses=True)
    model.set_input_tensor([torch.zeros(8, 1, HIDDEN)])
    with pytest.raises(InputError, match="neither alignment_plan nor input_ids say where"):
        arrived_from_stage_before(model, ForwardInputs(), cut=SequenceCut(), tally=None)


def test_levels_that_have_no_place_are_refused(ranks: RankPool) -> None:
    ranks(1)(refusals)
