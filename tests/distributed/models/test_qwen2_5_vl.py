"""Qwen2.5-VL beyond what every family shows: tied embeddings, packing, context parallelism."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.packed import packed_logits
from tests.distributed.models.ranks import Layout, train
from tests.distributed.models.test_families import LOSSES, check
from tests.rank_pool import RankPool


def tie(config: Any) -> None:
    config.tie_word_embeddings = True


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Expected:
    (computed,) = ranks(1)(compute_expected, "qwen2_5_vl", tie, train=True)
    assert isinstance(computed, Expected)
    return computed


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=["one", "tp2", "pp2"]
)
def test_with_tied_embeddings(ranks: RankPool, expected: Expected, layout: Layout) -> None:
    check(ranks, "qwen2_5_vl", layout, expected)


def test_trains_as_a_plain_loop_does(ranks: RankPool, expected: Expected) -> None:
    layout = Layout(tp=2)
    assert expected.trained[-1] < 0.8 * expected.trained[0]
    for losses in ranks(layout.world_size)(train, "qwen2_5_vl", layout, expected):
        assert losses == pytest.approx(expected.trained, rel=LOSSES)


@pytest.mark.parametrize("cp", [1, 2])
def test_a_packed_row_has_the_logits_of_its_samples(
    ranks: RankPool, expected: Expected, cp: int
) -> None:
    for distances in ranks(cp)(packed_logits, "qwen2_5_vl", expected, cp):
        assert len(distances) == len(expected.examples)
        assert max(distances) < 1e-4
