"""Adapters equal PEFT's in every layout: logits, gradients, checkpoints, merging."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.lora.ranks import (
    Adapted,
    Tensors,
    compare,
    compute_adapted,
    first_logits,
    merged_logits,
    read_adapters,
)
from tests.distributed.models.ranks import Layout
from tests.rank_pool import RankPool
from tests.tiers import some

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp-recompute": Layout(tp=2, changes={"sequence_parallel": True, **RECOMPUTE}),
    "pp2": Layout(pp=2),
}
MODULES = {
    "llava": ("language", "images.encoders"),
    "qwen2_5_vl": ("language", "images.encoders.qwen2_5_vl"),
    "qwen3_vl": ("language", "images"),
}


@dataclass(frozen=True)
class Case:
    name: str
    modules: tuple[str, ...]
    wanted: Adapted
    folder: Path


@pytest.fixture(scope="module", params=some(MODULES, "qwen3_vl"))
def case(
    ranks: RankPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    (wanted,) = ranks(1)(compute_adapted, name, MODULES[name], folder)
    return Case(name, MODULES[name], wanted, folder)


@pytest.mark.parametrize("name", some(LAYOUTS, "tp2-sp-recompute", "pp2"))
def test_equals_peft(ranks: RankPool, case: Case, name: str) -> None:
    """Adapters that one process saved, loaded in the layout."""
    layout = LAYOUTS[name]
    wanted, folder = case.wanted, case.folder
    results = ranks(layout.world_size)(compare, case.name, layout, case.modules, wanted, folder)
    for loss, difference in results:
        assert loss == pytest.approx(wanted.base.loss, rel=1e-4)
        assert difference < 1e-4
    (saved,) = folder.glob(f"gradients-{layout.tp}-{layout.pp}-{len(layout.changes)}")
    (found,) = ranks(1)(read_adapters, case.name, case.modules, wanted.base, saved)
    assert _errors(found, wanted.gradients) == {}


def test_adapters_change_nothing_before_they_are_trained(ranks: RankPool, case: Case) -> None:
    differences = ranks(2)(first_logits, case.name, Layout(tp=2), case.modules, case.wanted)
    assert max(differences) < 1e-4


def test_merged_adapters_give_the_same(ranks: RankPool, case: Case) -> None:
    differences = ranks(2)(merged_logits, case.name, case.modules, case.wanted, case.folder)
    assert max(differences) < 1e-4


def _errors(found: Tensors, wanted: Tensors) -> dict[str, float]:
    assert set(found) == set(wanted)
    errors = {
        name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted
    }
    return {name: error for name, error in errors.items() if not error < 1e-3}
