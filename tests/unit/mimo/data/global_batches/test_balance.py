from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.models.mimo.errors import ConfigError
from megatron.mimo.data.global_batches.balance import CostModel, busiest_over_mean, divide
from megatron.mimo.data.measure import Measure


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_item_is_trained_on_once(
    ranks: int, micro: int, count: int, generator: random.Random
) -> None:
    costs = [generator.lognormvariate(0, 1) for _ in range(ranks * micro * count)]
    shares = divide(costs, ranks, micro)
    assert [len(share) for share in shares] == [count] * ranks
    assert {len(batch) for share in shares for batch in share} == {micro}
    dealt = sorted(item for share in shares for batch in share for item in batch)
    assert dealt == list(range(len(costs)))
    assert divide(costs, ranks, micro) == shares


@pytest.mark.parametrize(("ranks", "micro"), [(2, 1), (8, 1), (8, 2), (16, 4)])
def test_ranks_wait_little_for_the_busiest(ranks: int, micro: int) -> None:
    generator = random.Random(3)
    costs = [generator.lognormvariate(0, 0.7) for _ in range(ranks * 16)]
    shares = [[item for batch in share for item in batch] for share in divide(costs, ranks, micro)]
    in_turn = [list(range(rank, len(costs), ranks)) for rank in range(ranks)]
    assert busiest_over_mean(costs, shares) < 1.05 < busiest_over_mean(costs, in_turn)


def test_micro_batches_at_the_same_place_cost_about_the_same() -> None:
    generator = random.Random(4)
    costs = [generator.lognormvariate(0, 0.7) for _ in range(128)]
    shares = divide(costs, 4, 2)
    for place in range(16):
        loads = [sum(costs[item] for item in share[place]) for share in shares]
        assert max(loads) < 1.5 * sum(loads) / 4
    firsts = [sum(costs[item] for item in batch) for batch in shares[0]]
    assert firsts == sorted(firsts, reverse=True)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch of 10 .* of 2 on 4 .* multiple of 8"):
        divide([1.0] * 10, 4, 2)


def test_costs_count_pairs_within_samples_and_rows_of_media() -> None:
    costs = CostModel(per_token=10, per_pair=2, encoders={"images": (100, 1)})
    two = [Measure(3, (("images", 2),)), Measure(4, (("other", 9),))]
    media = 100 * 2 + 2**2
    assert costs.of(two, 8, packed=True) == 10 * 8 + (3**2 + 4**2) + media
    assert costs.of(two[:1], 8, packed=False) == 10 * 8 + 8**2 + media
