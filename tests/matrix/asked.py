"""The verdicts of a test file's cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.matrix.cells import Values
from tests.matrix.runner import Verdict, run
from tests.rank_pool import RankPool

__all__ = ["asked_verdicts"]


def asked_verdicts(
    request: pytest.FixtureRequest,
    ranks: RankPool,
    cells: Mapping[str, Values],
    test: Callable[..., None],
) -> dict[str, Verdict]:
    """Of the cells that this session asks for; run together, they share their processes.

    Args:
        request: of a fixture of the module that ``test`` is in.
        ranks: where they run.
        cells: by the names that ``test`` is parametrised with.
        test: of one cell, whose ``name`` it takes.
    """
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "originalname", None) == test.__name__ and item.path == request.path
    }
    return {verdict.name: verdict for verdict in run([cells[name] for name in asked], ranks)}
