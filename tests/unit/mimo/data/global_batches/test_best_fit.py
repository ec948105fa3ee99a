from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.mimo.data.global_batches.best_fit import fill_sequence, packing_efficiency


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_a_sequence_fits_and_nothing_else_would(lengths: list[int], capacity: int) -> None:
    taken = fill_sequence(lengths, capacity)
    used = sum(lengths[number] for number in taken)
    assert taken[0] == 0
    assert len(set(taken)) == len(taken)
    assert used <= capacity
    left = [length for number, length in enumerate(lengths) if number not in taken]
    assert not left or min(left) > capacity - used


def test_the_longest_that_fits_is_taken_and_of_equals_the_first() -> None:
    assert fill_sequence([5, 9, 3, 4, 4, 1], 10) == [0, 3, 5]
    assert fill_sequence([10, 1], 10) == [0]
    assert fill_sequence([2, 2, 2, 2], 6) == [0, 1, 2]


@pytest.mark.parametrize("spread", ["even", "long tail", "two sizes"])
def test_four_times_the_longest_is_filled_to_95_percent(spread: str) -> None:
    generator = random.Random(1)
    lengths = {
        "even": lambda: generator.randint(20, 512),
        "long tail": lambda: min(512, int(generator.lognormvariate(4.5, 0.8)) + 8),
        "two sizes": lambda: generator.choice([60, 500]),
    }[spread]
    waiting, sequences = [lengths() for _ in range(256)], []
    for _ in range(200):
        taken = fill_sequence(waiting, 2048)
        sequences.append([waiting[number] for number in taken])
        waiting = [one for number, one in enumerate(waiting) if number not in taken]
        waiting += [lengths() for _ in taken]
    assert packing_efficiency(sequences, 2048) > 0.95
