"""The benchmark of the gated delta rule under context parallelism, on small sizes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from tests.rank_pool import RankPool


def rows(asked: Namespace) -> list[dict[str, Any]]:
    """What a rank finds; runs on every rank."""
    from benchmarks.linear_attention_ranks import compare

    return [compare(tokens, asked) for tokens in asked.lengths]


def test_both_ways_are_compared(ranks: RankPool) -> None:
    asked = Namespace(ranks=2, lengths=(16, 128), key_heads=2, value_heads=4, head_size=8)
    asked.repeats = 1
    for short, long in ranks(2)(rows, asked):
        assert (short["taken"], long["taken"]) == ("heads", "states")
        # Bytes that are sent are those that the choice is made by.
        assert short["heads"]["mb"] < short["states"]["mb"]
        assert long["states"]["mb"] == short["states"]["mb"] < long["heads"]["mb"]
        assert max(short["relative_difference"], long["relative_difference"]) < 1e-5
