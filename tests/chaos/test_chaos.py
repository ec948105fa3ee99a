"""The short form of the campaign: a few malformed inputs of each kind, and the engine itself."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from megatron.core.models.mimo.errors import InputError
from tests.chaos import __main__, fuzz
from tests.chaos.__main__ import INPUTS
from tests.chaos.fuzz import Case, run_cases
from tests.rank_pool import RankPool
from tests.time_limits import HANG


def test_malformed_inputs_are_taken_or_refused_by_name(ranks: RankPool) -> None:
    """In a process of its own: cases are forked, which this one, having threads, had better not."""
    command = [Path(__main__.__file__), "--seed", "10", "--cases", "12", "--minutes", "4"]
    (done,) = ranks.script(1, [*command, "--only", *INPUTS], timeout=2 * HANG + 240)
    assert done.exit_code == 0, done.stdout + done.stderr
    for kind in INPUTS:
        assert re.search(rf"^{kind}: 12 cases in .* [1-9]\d* refused by name", done.stdout, re.M)


def kind_of(act: Callable[[Random], None]) -> fuzz.Kind:
    @contextmanager
    def kind() -> Iterator[Case]:
        yield act

    return kind


def _refuse(_: Random) -> None:
    raise InputError("line 3: no")


def _fail(_: Random) -> None:
    raise KeyError("unnamed")


def _say_nothing(_: Random) -> None:
    raise InputError(" ")


def _flood(_: Random) -> list[bytearray]:
    return [bytearray(100 << 10) for _ in range(640)]


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (lambda _: None, "taken"),
        (_refuse, "refused by name"),
        (_fail, "failed"),
        (_say_nothing, "failed"),
        (lambda _: os._exit(1), "failed"),
        (lambda _: time.sleep(2 * HANG), "failed"),
        (_flood, "failed"),
    ],
    ids=["taken", "refused", "an unnamed error", "an empty one", "a crash", "a hang", "a flood"],
)
def test_the_engine_sees_what_a_case_does(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Random], None], outcome: str
) -> None:
    monkeypatch.setattr(fuzz, "CASE_SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MEMORY", 32 << 20)
    tally = run_cases("x", kind_of(act), seed=3, seconds=HANG, at_most=2)
    assert tally.outcomes == {outcome: 2}
    assert len(tally.failures) == (2 if outcome == "failed" else 0)
    assert all(text.startswith("x --seed 3 --case ") for text in tally.failures)


@pytest.mark.parametrize("size", [128 << 20, 100 << 10], ids=["one block", "many small ones"])
def test_a_flood_is_seen_in_memory_that_was_given_back(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A process begins with what the one before it held, and may give that back: to the system, or
    to the C library, which keeps it for the next to ask.
    """
    monkeypatch.setattr(fuzz, "MEMORY", 32 << 20)
    held = [bytearray(size) for _ in range((128 << 20) // size)]
    last = bytearray(size)  # behind them: the end of the heap would be given back at once

    @contextmanager
    def kind() -> Iterator[Case]:
        held.clear()
        yield _flood

    tally = run_cases("x", kind, seed=3, seconds=HANG, at_most=1)
    (said,) = tally.failures
    assert " MiB were taken" in said
    del last


def test_a_case_follows_from_seed_and_number() -> None:
    one, two = (Random("1/x/7") for _ in range(2))
    assert fuzz.scramble(bytes(range(100)), one) == fuzz.scramble(bytes(range(100)), two)
    assert fuzz.disturb({"a": [1, {"b": "c"}]}, Random(4)) == fuzz.disturb(
        {"a": [1, {"b": "c"}]}, Random(4)
    )
