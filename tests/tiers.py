"""What the suite runs by default; ``--wide`` (make test-all, and CI) runs all.

A test, or a row of a table, that repeats what another shows in other sizes or layouts, or that
needs interpreters of its own, is marked ``wide``. A table keeps each kind of row: by name
(``some``), or, of two things that are crossed, each of the first with one of the second in turn
(``crossed``), so that a new family is in it without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["crossed", "left_out", "some"]


def some(rows: Iterable[str], *kept: str) -> list[Any]:
    """All rows for ``parametrize``, marked ``wide`` but for those that are kept."""
    names = list(rows)
    unknown = set(kept) - set(names)
    if unknown:
        raise ValueError(f"rows {sorted(unknown)} are none of this table's: {names}")
    return [pytest.param(name, marks=() if name in kept else pytest.mark.wide) for name in names]


def crossed(
    first: Iterable[str],
    second: Sequence[str],
    *,
    whole: Iterable[str] = (),
    wide: Sequence[str] = (),
) -> list[Any]:
    """Pairs for ``parametrize(("one", "other"), ...)``: each of the first with one of the second.

    Args:
        first: what every one of has to be in the default run.
        second: what is dealt out to them in turn.
        whole: of the first, those that keep all of the second.
        wide: more of the second that the default run leaves out, but for ``whole``.
    """
    first = list(first)
    whole = set(whole)
    if not whole <= set(first):
        raise ValueError(f"{sorted(whole)} are not all among {first}")
    return [
        pytest.param(one, other, marks=() if one in whole or other == turn else pytest.mark.wide)
        for number, one in enumerate(first)
        for turn in (second[number % len(second)],)
        for other in (*wide, *second)
    ]


def left_out(
    items: Sequence[pytest.Item], arguments: Sequence[str], markers: str
) -> list[pytest.Item]:
    """What a run without ``--wide`` leaves out; nothing where it is told which tests to run.

    Args:
        items: collected.
        arguments: files, folders or tests, as given to pytest.
        markers: given by ``-m``.
    """
    if "wide" in markers or any("::" in argument for argument in arguments):
        return []
    return [item for item in items if item.get_closest_marker("wide")]
