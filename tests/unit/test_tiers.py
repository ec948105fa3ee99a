"""Tiers keep each kind of row, and leave out no test that was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiers import crossed, left_out, some


def kept(rows: list[Any]) -> list[Any]:
    return [row.values if len(row.values) > 1 else row.values[0] for row in rows if not row.marks]


def test_rows_that_are_named_stay_and_all_others_are_wide() -> None:
    rows = some({"a": 1, "b": 2, "c": 3}, "c", "a")
    assert [row.values for row in rows] == [("a",), ("b",), ("c",)]
    assert kept(rows) == ["a", "c"]
    with pytest.raises(ValueError, match=r"rows \['d'\] are none of this table's"):
        some(["a"], "d")


def test_each_of_the_first_meets_one_of_the_second_in_turn() -> None:
    rows = crossed("abc", ("x", "y"), whole="b", wide=("z",))
    assert {row.values for row in rows} == {(one, other) for one in "abc" for other in "xyz"}
    assert len(rows) == 9
    assert set(kept(rows)) == {("a", "x"), ("b", "x"), ("b", "y"), ("b", "z"), ("c", "x")}
    with pytest.raises(ValueError, match="are not all among"):
        crossed("ab", ("x",), whole="c")


@pytest.mark.wide
def test_wide_tests_run_when_they_are_asked_for(request: pytest.FixtureRequest) -> None:
    option = request.config.option
    named = any("::" in one for one in request.config.args)
    assert option.wide or named or "wide" in option.markexpr


def test_wide_tests_are_left_out_where_nothing_asks_for_them(
    request: pytest.FixtureRequest,
) -> None:
    item = request.node
    assert left_out([item], ["tests"], "") == []
    item.add_marker("wide")
    assert left_out([item], ["tests", "tests/unit"], "not slow") == [item]
    assert left_out([item], ["tests", "tests/unit/test_tiers.py::test_x"], "") == []
    assert left_out([item], ["tests"], "wide and not slow") == []
