"""The section of ``docs/parallelism.md`` on modules that have grids of their own."""

from __future__ import annotations

from collections.abc import Sequence

from tests.matrix.cells import Values
from tests.matrix.grid_cells import FEATURES, grid_features, is_apart
from tests.matrix.page import passed
from tests.matrix.runner import Verdict

__all__ = ["GRIDS", "grids_section"]

GRIDS = "## Modules on grids of their own"


def grids_section(verdicts: Sequence[Verdict]) -> list[str]:
    """Of ``grid_cells``."""
    lines = [
        GRIDS,
        "",
        "`--grids`: encoders and language model with sizes of their own, on the same ranks or on",
        "ranks of their own, run by `EncodeFirst` ([layouts.md](layouts.md)). Rows are uneven in",
        "all cells with media. Fan-in: an encoder has more replicas than the",
        "language model; fan-out: fewer; uneven: neither number divides the other. Counted are",
        "cells on the same ranks + cells on ranks of their own.",
        "",
        passed(verdicts),
        "",
        f"| | cells | {' | '.join(FEATURES)} | largest fp32 deviation |",
        "|---" * (len(FEATURES) + 3) + "|",
    ]
    for row in FEATURES:
        having = [one for one in verdicts if row in grid_features(one.values)]
        shown = [_kinds([one.values for one in having])]
        for column in FEATURES:
            meeting = [one.values for one in having if column in grid_features(one.values)]
            shown.append(_kinds(meeting) if column != row else "·")
        exact = [one.error for one in having if one.values["precision"] == "fp32"]
        shown.append(f"{max(exact):.1e}" if exact else "see above")
        lines.append(f"| **{row}** | {' | '.join(shown)} |")
    apart = sum(is_apart(one.values) for one in verdicts)
    return [
        *lines,
        "",
        f"{apart} cells have modules on ranks of their own. There, fan-in beside uneven replicas",
        "takes more than 8.",
        "",
    ]


def _kinds(cells: Sequence[Values]) -> str:
    apart = sum(map(is_apart, cells))
    return f"{len(cells) - apart} + {apart}"
