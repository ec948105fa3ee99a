"""Runs cells on the rank pool and says which of them equal one process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.distributed.core.reference import Design
from tests.matrix.cells import Values, make_cell, name_of
from tests.matrix.ranks import Expected, Seen, run_cells, run_references
from tests.rank_pool import RankPool, RanksFailedError

BATCH = 12  # cells that share one set of rank processes
_SECONDS = 300.0  # for each cell: a time-out, not an expectation


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative: to the norm of each parameter's gradient or weights; to losses and whole norms.

    Attributes:
        scalar: for losses, and the norm of the first step.
        later_norm: for those of the steps behind it.
    """

    gradient: float
    weights: float
    scalar: float
    later_norm: float


FP32 = Tolerance(gradient=1e-5, weights=1e-5, scalar=1e-5, later_norm=1e-5)
# bf16 has 8 bits: 4e-3 for each rounding. Compared with one process in bf16, whose sums are
# rounded elsewhere. Of two of one process that differ by a rounding of each weight (test_rounding),
# norms of the first step lie within 1 %, and of the third within 7 % where only projections are
# trained; behind a frozen language model gradients of an encoder's norms lie within 13 %, and their
# biases, which hold nothing but what Adam has divided, within 20 %.
BF16 = Tolerance(gradient=2e-1, weights=3e-1, scalar=2e-2, later_norm=1e-1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one cell.

    Attributes:
        error: largest relative error of a gradient or a trained weight.
        failure: what was wrong; "" for a cell that passed.
    """

    values: Values
    name: str
    ranks: int
    seconds: float
    error: float
    failure: str = ""


def run(cells: Iterable[Values], pool: RankPool) -> Iterator[Verdict]:
    """Verdicts, as they come: cells of one world size and equal process groups together."""
    known: dict[Design, Expected] = {}

    def order(values: Values) -> tuple[int, str]:
        layout, _ = make_cell(values)
        return layout.world_size, str(layout.group_sizes)

    left = sorted(cells, key=order)
    while left:
        ranks = order(left[0])[0]
        batch = [values for values in left[:BATCH] if order(values)[0] == ranks]
        left = left[len(batch) :]
        yield from _run_batch(batch, ranks, pool, known)


def _run_batch(
    batch: list[Values], ranks: int, pool: RankPool, known: dict[Design, Expected]
) -> Iterator[Verdict]:
    pairs = [make_cell(values) for values in batch]
    new = [design for design in dict.fromkeys(design for _, design in pairs) if design not in known]
    if new:
        (expected,) = pool(1, timeout=_SECONDS * len(new))(run_references, new)
        known |= dict(zip(new, expected, strict=True))
    jobs = [(layout, design, known[design]) for layout, design in pairs]
    try:
        seen = pool(ranks, timeout=_SECONDS * len(jobs))(run_cells, jobs)
    except RanksFailedError as error:
        if len(batch) == 1:
            yield _verdict(batch[0], ranks, [], known[pairs[0][1]], str(error))
            return
        # One cell brought the others down: each on its own shows which.
        for values in batch:
            yield from _run_batch([values], ranks, pool, known)
        return
    for number, (values, (_, design)) in enumerate(zip(batch, pairs, strict=True)):
        yield _verdict(values, ranks, [of_rank[number] for of_rank in seen], known[design])


def _verdict(
    values: Values, ranks: int, seen: list[Seen], expected: Expected, failure: str = ""
) -> Verdict:
    tolerance = BF16 if values["precision"] == "bf16" else FP32
    errors = [error for one in seen for error in (*one.gradients.values(), *one.trained.values())]
    return Verdict(
        values=values,
        name=name_of(values),
        ranks=ranks,
        seconds=max((one.seconds for one in seen), default=0.0),
        error=max(errors, default=0.0),
        failure=failure or "; ".join(deviations(seen, expected, tolerance)),
    )


def deviations(seen: list[Seen], expected: Expected, tolerance: Tolerance) -> Iterator[str]:
    """What differs from one process, and what no rank has compared."""
    for rank, one in enumerate(seen):
        for what, errors, bound in (
            ("gradient", one.gradients, tolerance.gradient),
            ("weights", one.trained, tolerance.weights),
        ):
            for name, error in errors.items():
                if not error <= bound:
                    yield f"rank {rank}: {what} of {name} off by {error:.1e}"
        for what, got, wanted, later in (
            ("loss", one.losses, expected.losses, tolerance.scalar),
            ("norm", one.norms, expected.norms, tolerance.later_norm),
        ):
            for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
                bound = tolerance.scalar if step == 0 else later
                if not math.isclose(mine, theirs, rel_tol=bound, abs_tol=1e-12):
                    yield f"rank {rank}: {what} of step {step} is {mine}, expected {theirs}"
    for key, tensor in expected.trained.items():
        spans = set().union(*(one.covered.get(key, set()) for one in seen))
        if sum(span[-1] for span in spans) != tensor.numel():
            yield f"{key}: the ranks compared {sorted(spans)} of {tensor.numel()} elements"
