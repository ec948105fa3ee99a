"""The benchmark of data runs with small sizes, and its distributions are packed and balanced."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data_lengths import DISTRIBUTIONS

SIZES = {"look_ahead": 256, "global_batch": 128, "batches": 2, "ranks": 8}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sequences_are_full_and_ranks_are_equal(name: str) -> None:
    report = data.measure_packing(DISTRIBUTIONS[name], Namespace(**SIZES))
    # of captions five fit, whatever packs them, and five of the mean length leave 6 %
    assert report["efficiency"] > min(0.95, 0.99 * report["efficiency_at_most"])
    assert (report["efficiency_at_most"] < 0.95) == (name == "captions")
    assert report["busiest_over_mean"] < 1.05
    assert report["busiest_over_mean_unpacked"] < 1.05


@pytest.mark.slow
def test_both_loops_read_the_same_images(tmp_path: Path) -> None:
    args = Namespace(side=28, images=4, samples=8, repeats=1, lines=50)
    reading = data.measure_reading(tmp_path, args)
    assert min(reading["samples_per_second"].values()) > 0
    assert reading["of_by_hand_per_core"] > 0
    assert reading["worker_own_mib"] > 0
    start = data.measure_start(tmp_path, args)
    assert (start["lines"], start["first_batch_seconds"] > 0) == (50, True)
