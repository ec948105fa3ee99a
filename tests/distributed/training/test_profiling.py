"""``--profile``: which iterations are recorded, of which ranks, and what stands in the trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.distributed.training.launch import succeed
from tests.rank_pool import RankPool

EVERYWHERE = {"layers", "backward", "gradients", "optimizer"}
PARTS = {*EVERYWHERE, "data", "encode images", "merge", "loss"}


def traced(output: Path, rank: int) -> tuple[set[str], list[str]]:
    """The ranges by part in a rank's trace, and the steps."""
    with gzip.open(output / f"torch_profile/rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return names & PARTS, sorted(name for name in names if name.startswith("ProfilerStep"))


def test_a_trace_and_what_it_says(ranks: RankPool, tmp_path: Path) -> None:
    steps = ("--profile", "--profile-step-start", "3", "--profile-step-end", "5")
    printed = succeed(ranks, tmp_path, "pp2", *steps, "--profile-ranks", "0", "1")
    first, first_steps = traced(tmp_path, 0)
    last, last_steps = traced(tmp_path, 1)
    assert first >= {*EVERYWHERE, "data", "encode images", "merge"}
    assert "loss" not in first
    assert last >= {*EVERYWHERE, "loss"}
    assert not {"encode images", "merge"} & last
    assert first_steps == last_steps == ["ProfilerStep#3", "ProfilerStep#4"]
    text = (tmp_path / "torch_profile/rank-0.txt").read_text()
    assert text in printed
    assert text.startswith("profile of iteration 3 to 4, rank 0: 2 steps of ")
    assert "of the time of 1 thread\n" in text
    assert "  encode images  " in text
    assert "  optimizer  " in text
    assert "megatron/mimo/layers/adam.py:" in text  # a place that would wait
    largest = text.partition("largest operators")[2].splitlines()[1:]
    assert len(largest) == 10

    # Counted from the run's beginning in a process that goes on with iteration 7, up to its end.
    more = ("--train-iters", "8", "--profile-step-start", "7", "--profile-step-end", "99")
    printed = succeed(ranks, tmp_path, "one", "--profile", *more)
    assert "profile of iteration 7 to 8, rank 0: 2 steps of " in printed
    assert "begin at a later one" in printed  # no iteration before, in which to look for places
    assert traced(tmp_path, 0)[0] == PARTS

    more = ("--train-iters", "9", "--profile-step-start", "3", "--profile-step-end", "5")
    printed = succeed(ranks, tmp_path, "one", "--profile", *more)
    assert "nothing is profiled: --profile-step-start is 3, and this run has the" in printed


@pytest.mark.parametrize(
    "components",
    [
        pytest.param(("images=tp=2", "language=dp=2"), id="colocated", marks=pytest.mark.wide),
        pytest.param(("images=dp=1", "language=rank_offset=1"), id="disjoint"),
    ],
)
def test_grids_have_the_same_ranges(
    ranks: RankPool, tmp_path: Path, components: tuple[str, ...]
) -> None:
    flags = ("--component", *components, "--profile", "--profile-ranks", "0", "1")
    steps = ("--train-iters", "2", "--profile-step-start", "2", "--profile-step-end", "3")
    succeed(ranks, tmp_path, "dp2", *flags, *steps)
    encoders, language = (traced(tmp_path, rank)[0] for rank in (0, 1))
    assert encoders >= {"encode images", "backward", "gradients", "optimizer"}
    assert language >= {*EVERYWHERE, "merge", "loss"}
