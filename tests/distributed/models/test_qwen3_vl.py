"""Qwen3-VL beyond what every family shows: ties, sequence parallelism, packing, experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.packed import packed_logits
from tests.distributed.models.ranks import Layout, train
from tests.distributed.models.test_families import LOSSES, check
from tests.rank_pool import RankPool
from tests.tiers import some

SP = {"sequence_parallel": True}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
DENSE = {
    "one": Layout(),
    "tp2-sp": Layout(tp=2, changes=SP),
    "pp2": Layout(pp=2),
    "tp2-sp-pp2-cp2": Layout(tp=2, pp=2, cp=2, changes=SP),
    "pp2-recomputed": Layout(
        pp=2,
        changes={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}
EXPERTS = {
    "ep2": Layout(dp=2, ep=2),
    "ep2-pp2": Layout(pp=2, dp=2, ep=2, changes=ALLTOALL),
    "ep2-tp2-sp": Layout(tp=2, ep=2, etp=1, changes=SP | ALLTOALL),
    "ep2-etp2-sp": Layout(tp=2, dp=2, ep=2, etp=2, changes=SP),
    "ep2-cp2": Layout(cp=2, ep=2, changes=ALLTOALL),
}


def tie(config: Any) -> None:
    """Ties the output layer; levels of three layers of the encoder for a decoder of four."""
    config.tie_word_embeddings = True
    config.vision_config.deepstack_visual_indexes = [0, 1, 3]
    config.text_config.num_hidden_layers = 4


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def of(name: str) -> Expected:
        if name not in known:
            change = tie if name == "qwen3_vl" else None
            (known[name],) = ranks(1)(
                compute_expected, name, change, samples=5, text_only=True, train=True
            )
        return known[name]

    return of


@pytest.mark.parametrize("layout", some(DENSE, "tp2-sp-pp2-cp2", "pp2-recomputed"))
def test_with_tied_embeddings_and_three_levels(
    ranks: RankPool, expected: Callable[[str], Expected], layout: str
) -> None:
    check(ranks, "qwen3_vl", DENSE[layout], expected("qwen3_vl"))


@pytest.mark.parametrize("layout", some(EXPERTS, "ep2-tp2-sp", "ep2-etp2-sp"))
def test_with_experts_on_ranks(
    ranks: RankPool, expected: Callable[[str], Expected], layout: str
) -> None:
    check(ranks, "qwen3_vl_moe", EXPERTS[layout], expected("qwen3_vl_moe"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("qwen3_vl", Layout(pp=2), marks=pytest.mark.wide),
        pytest.param("qwen3_vl", Layout(cp=2), marks=pytest.mark.wide),
        ("qwen3_vl_moe", Layout(dp=2, ep=2)),
        pytest.param("qwen3_vl_moe", Layout(pp=2), marks=pytest.mark.wide),
    ],
    ids=["pp2", "cp2", "ep2", "experts-pp2"],
)
def test_trains_as_a_plain_loop_does(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, layout: Layout
) -> None:
    wanted = expected(name)
    for losses in ranks(layout.world_size)(train, name, layout, wanted):
        assert losses == pytest.approx(wanted.trained, rel=LOSSES)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("cp", [pytest.param(1, marks=pytest.mark.wide), 2])
def test_a_packed_row_has_the_logits_of_its_samples(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, cp: int
) -> None:
    wanted = expected(name)
    for distances in ranks(cp)(packed_logits, name, wanted, cp):
        assert len(distances) == len(wanted.examples)
        assert max(distances) < 1e-4
