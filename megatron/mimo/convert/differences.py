"""In words, how one matrix differs from another: transposed, its rows or columns in another order.

Such words show sooner than a number what was done to a weight, or to a part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["told"]

_MOST_RUNS = 4


def told(theirs: Tensor, ours: Tensor) -> str:
    """Words about two tensors of one shape that differ; "" where they are not simply rearranged."""
    if theirs.dim() != 2:
        return ""
    if theirs.size(0) == theirs.size(1) and torch.equal(theirs, ours.T):
        return "it is transposed"
    for what, one, other in (("rows", theirs, ours), ("columns", theirs.T, ours.T)):
        moved = _moved(one, other)
        if moved:
            return f"{what} {_runs(moved)}"
    return ""


def _moved(theirs_RC: Tensor, ours_RC: Tensor) -> dict[int, int]:
    """Of the rows that differ, ours -> the row of theirs that equals it.

    {} unless these are the same rows in another order.
    """
    differs_R = (theirs_RC != ours_RC).any(dim=1)
    rows = differs_R.nonzero().flatten().tolist()
    place = {_key(theirs_RC[row]): row for row in rows}
    moved = {row: place.get(_key(ours_RC[row])) for row in rows}
    found = {row: other for row, other in moved.items() if other is not None}
    return found if len(found) == len(rows) and sorted(found.values()) == rows else {}


def _key(row_C: Tensor) -> bytes:
    return row_C.contiguous().view(torch.uint8).numpy().tobytes()


def _runs(moved: dict[int, int]) -> str:
    """The rows that were moved together, such as those of a head."""
    runs: list[tuple[int, int, int]] = []  # first of ours, first of theirs, how many
    for row, other in sorted(moved.items()):
        if runs and (row, other) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((row, other, 1))
    if len(runs) > _MOST_RUNS:
        return f"are in another order: {len(moved)} of them, from {min(moved)} on"
    if len(runs) == 2 and runs[0] == (runs[1][1], runs[1][0], runs[1][2]):
        (one, other, count), _ = runs
        return f"{one}-{one + count - 1} and {other}-{other + count - 1} are exchanged"
    return "are in another order: " + ", ".join(
        f"{one}-{one + count - 1} are the directory's {other}-{other + count - 1}"
        for one, other, count in runs
    )
