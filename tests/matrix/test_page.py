"""``docs/parallelism.md`` says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.matrix.cells import AXES, FULL_SIZE, all_cells, name_of
from tests.matrix.deepstack_cells import deepstack_cells
from tests.matrix.grid_cells import FEATURES as GRID_FEATURES
from tests.matrix.grid_cells import grid_cells, grid_features, is_apart
from tests.matrix.grids_page import GRIDS
from tests.matrix.linear_cells import linear_cells
from tests.matrix.page import FEATURES, MEANING, SECTIONS, section_of
from tests.matrix.refusals import messages_of_flags, messages_of_library
from tests.rank_pool import RankPool

PAGE = (Path(__file__).parents[2] / "docs/parallelism.md").read_text()


def test_refusals_are_those_of_the_code(ranks: RankPool) -> None:
    refused = messages_of_flags() | messages_of_library(ranks)
    told = dict(re.findall(r"^- \*\*(.+?)\*\*.*\n  > (.+)$", PAGE, re.MULTILINE))
    assert told == refused


def test_page_is_of_the_full_set() -> None:
    assert f"**{FULL_SIZE} cells passed, 0 failed**" in PAGE
    counted = dict(re.findall(r"^\| ([^|*]+?) \| [^|]+ \| (\d+) \| [\d, ]+ \|", PAGE, re.MULTILINE))
    cells = all_cells()
    assert {name: int(counted[name]) for name in FEATURES} == {
        name: sum(values[axis] in kinds for values in cells)
        for name, (axis, kinds) in FEATURES.items()
    }


@pytest.mark.parametrize("layers", SECTIONS)
def test_every_cell_of_a_section_is_told(layers: str) -> None:
    title, words = SECTIONS[layers]
    section = section_of(PAGE, title)
    assert section.startswith("\n" + "\n".join(words))
    cells = {"deepstack": deepstack_cells, "linear": linear_cells}[layers]()
    assert f"**{len(cells)} cells passed, 0 failed**" in section
    told = re.findall(r"^\| ([\w:-]+(?: rank)?) \| \d+ \|", section, re.MULTILINE)
    names = {f"{one}-layers:{layers}".removeprefix("one rank-") for one in told}
    assert len(told) == len(cells)
    assert names == {name_of(values) for values in cells}


def test_every_grid_is_told() -> None:
    section = section_of(PAGE, GRIDS)
    cells = grid_cells()
    assert f"**{len(cells)} cells passed, 0 failed**" in section
    told = dict(re.findall(r"^\| \*\*(.+?)\*\* \| (\d+ \+ \d+) \|", section, re.MULTILINE))
    having = {name: [v for v in cells if name in grid_features(v)] for name in GRID_FEATURES}
    apart = {name: sum(map(is_apart, found)) for name, found in having.items()}
    assert told == {n: f"{len(having[n]) - apart[n]} + {apart[n]}" for n in GRID_FEATURES}


def test_every_value_is_told() -> None:
    assert set(FEATURES) == set(MEANING)
    told = {(axis, value) for axis, values in FEATURES.values() for value in values}
    silent = {"etp", "micro_batch"}  # shades of a feature, not one of their own
    for axis, values in AXES.items():
        if axis not in silent:
            assert {(axis, value) for value in values[1:]} <= told, axis
