from __future__ import annotations

import random

from megatron.mimo.data.reading.length_steps import LengthSteps


def test_few_lengths_tell_all() -> None:
    asked = []

    def rows(length: int) -> int:
        asked.append(length)
        return (length + 70) // 160

    steps, draw = LengthSteps(rows), random.Random(0)
    lengths = [draw.randrange(16_000) for _ in range(20_000)]
    assert [steps(one) for one in lengths] == [(one + 70) // 160 for one in lengths]
    assert len(asked) < 1200  # of 20,000, for 101 steps
    assert len(steps._lengths) <= 202  # the ends of steps are all that is kept
