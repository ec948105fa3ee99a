"""Families' tiny models equal transformers' under every layout: logits, every gradient, training.

A family gets its tests by standing in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.ranks import Layout, compare, train
from tests.rank_pool import RankPool

FAMILIES = ["llava", "llava_avlm", "llava_next", "qwen2_audio", "qwen2_5_vl"]
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, flags=("--sequence-parallel",)),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
}
LOGITS, GRADIENTS, LOSSES = 1e-4, 1e-3, 1e-3


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def of(name: str) -> Expected:
        if name not in known:
            (known[name],) = ranks(1)(compute_expected, name, train=name == "llava")
        return known[name]

    return of


def check(ranks: RankPool, name: str, layout: Layout, wanted: Expected) -> None:
    """Compare logits, loss and gradients, and that the ranks together have every parameter."""
    deviations = ranks(layout.world_size)(compare, name, layout, wanted)
    logits = [deviation.logits for deviation in deviations if deviation.logits is not None]
    assert logits
    assert max(logits) < LOGITS
    compared: set[str] = set()
    for rank, deviation in enumerate(deviations):
        assert deviation.loss == pytest.approx(wanted.loss, rel=1e-4)
        wrong = {key: error for key, error in deviation.gradients.items() if not error < GRADIENTS}
        assert not wrong, f"rank {rank}: relative errors {wrong}"
        compared |= deviation.gradients.keys()
    (whole,) = ranks(1)(trainable, name, wanted)
    assert compared - _copies(wanted) == whole


def _copies(wanted: Expected) -> set[str]:
    """The last stage holds a copy of a tied embedding, with the same gradient."""
    tied = wanted.config.tie_word_embeddings
    return {"language_model.output_layer.weight"} if tied else set()


def trainable(name: str, wanted: Expected) -> set[str]:
    """Our names of the parameters that the loss depends on."""
    from megatron.mimo.convert.match import match_names
    from megatron.mimo.models import load_family

    table = load_family(name).keys(wanted.config)
    given = match_names(wanted.weights.keys(), table, source="the reference").given
    return {
        row.mimo for row in table.each() if any(given[key] in wanted.gradients for key in row.hf)
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, layout: Layout
) -> None:
    check(ranks, name, layout, expected(name))


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2)], ids=["one", "dp2"])
def test_trains_as_a_plain_loop_does(
    ranks: RankPool, expected: Callable[[str], Expected], layout: Layout
) -> None:
    wanted = expected("llava")
    assert wanted.trained[-1] < 0.8 * wanted.trained[0]
    for losses in ranks(layout.world_size)(train, "llava", layout, wanted):
        assert losses == pytest.approx(wanted.trained, rel=LOSSES)
