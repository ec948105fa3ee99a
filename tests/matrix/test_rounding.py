"""What bf16 cells are compared to: how far one process lies from itself, for rounding alone."""

from __future__ import annotations

import pytest

from tests.distributed.core.reference import Design
from tests.matrix.ranks import Expected, run_reference
from tests.matrix.runner import BF16
from tests.rank_pool import RankPool, model_parallel

# The norm of little, after two steps of Adam.
PROJECTIONS = Design(
    layers=3, bf16=True, samples=6, frozen=("language", "images.encoders", "sounds")
)
# Gradients that have passed all of a frozen model, and biases that begin at 0.
ENCODERS = Design(bf16=True, tied=True, spans=True, frozen=("language",))


def moved_references(design: Design) -> list[Expected]:
    groups = model_parallel()
    return [run_reference(design, groups, seed) for seed in range(7)]


@pytest.mark.wide
def test_norms_and_losses_move_with_a_rounding_of_each_weight(ranks: RankPool) -> None:
    """By more than a bound of 2 %, and by less than the one that cells have."""
    ((expected, *found),) = ranks(1)(moved_references, PROJECTIONS)
    for step, bound in ((0, BF16.scalar), (2, BF16.later_norm)):
        norms = [one.norms[step] / expected.norms[step] - 1 for one in found]
        assert max(map(abs, norms)) < bound
    assert max(map(abs, norms)) > BF16.scalar
    for one in found:
        assert one.losses == pytest.approx(expected.losses, rel=BF16.scalar / 10)


@pytest.mark.wide
def test_gradients_and_weights_move_too(ranks: RankPool) -> None:
    ((expected, *found),) = ranks(1)(moved_references, ENCODERS)
    for of, low, bound in (
        ("gradients", BF16.gradient / 4, BF16.gradient),
        ("trained", BF16.weights / 3, BF16.weights),
    ):
        theirs = {name: one for name, one in getattr(expected, of).items() if one.any()}
        moved = max(
            float((getattr(one, of)[name] - value).float().norm() / value.float().norm())
            for one in found
            for name, value in theirs.items()
        )
        assert low < moved < bound, of
