"""The way to the first iteration, phase by phase."""

from __future__ import annotations

import re

import pytest

from megatron.mimo.training.start_clock import StartClock


def test_phases_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((103.0, 104.0, 109.0, 109.5, 111.5, 112.0, 120.0))
    monkeypatch.setattr("time.time", lambda: next(times))
    clock = StartClock(100.0)
    clock.reach("imports and arguments")
    build = clock.around(lambda number: number + 1)
    assert [build(1), build(2)] == [2, 3]  # two chunks of one model
    clock.reach("data")
    line = clock.first_iteration()
    assert line == (
        "20.0 s to the first iteration: imports and arguments 3.0, process groups 1.5, model 7.0, "
        "data 0.5, first iteration 8.0"
    )
    assert sum(float(number) for number in re.findall(r"[a-z] (\d+\.\d)", line)) == 20.0
    assert clock.first_iteration() is None
    clock.reach("data")  # of a later iteration: not asked for the time
