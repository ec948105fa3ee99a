"""Kinds of language models in LLaVA, under layouts: logits and every gradient of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.models.expected import Expected, compute_expected
from tests.distributed.models.packed import packed_logits
from tests.distributed.models.ranks import Layout
from tests.distributed.models.test_families import check
from tests.distributed.models.text_kinds import KINDS, has_experts, with_text
from tests.rank_pool import RankPool
from tests.tiers import crossed

SP = {"sequence_parallel": True}
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2, changes=SP),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
}
OF_EXPERTS = {
    "ep2": Layout(dp=2, ep=2),
    "ep2-tp2": Layout(tp=2, ep=2, etp=1, changes=SP),
    "ep2-cp2-alltoall": Layout(cp=2, ep=2, changes={"moe_token_dispatcher_type": "alltoall"}),
    "ep2-etp2": Layout(tp=2, dp=2, ep=2, etp=2, changes=SP),
}
EXPERTS = [name for name in KINDS if has_experts(name)]
CASES = [
    *crossed(KINDS, ("tp2", "pp2", "cp2"), wide=["one"]),
    *crossed(EXPERTS, ("ep2-tp2", "ep2-cp2-alltoall", "ep2-etp2"), wide=["ep2"]),
]


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> Callable[[str], Expected]:
    known: dict[str, Expected] = {}

    def of(name: str) -> Expected:
        if name not in known:
            (known[name],) = ranks(1)(
                compute_expected, "llava", with_text(name), samples=5, text_only=True
            )
        return known[name]

    return of


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_equals_transformers(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, layout: str
) -> None:
    check(ranks, "llava", (LAYOUTS | OF_EXPERTS)[layout], expected(name))


@pytest.mark.parametrize("cp", [pytest.param(1, marks=pytest.mark.wide), 2])
@pytest.mark.parametrize("name", ["mistral, windows", "qwen2, windows", "gemma3", "qwen3_moe"])
def test_a_packed_row_has_the_logits_of_its_samples(
    ranks: RankPool, expected: Callable[[str], Expected], name: str, cp: int
) -> None:
    for distances in ranks(cp)(packed_logits, "llava", expected(name), cp):
        assert distances
        assert max(distances) < 1e-4
