"""The benchmark of linear attention on small sizes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read on Linux")
def test_small_sizes() -> None:
    from benchmarks.linear_attention import run

    report = run(
        Namespace(
            device="cpu",
            lengths=(65, 130),
            key_heads=1,
            value_heads=2,
            head_size=8,
            recurrence_tokens=65,
            repeats=1,
        )
    )
    assert report["relative_difference"]["chunked"] < 1e-5
    short, long = report["lengths"]
    assert (short["tokens"], long["tokens"]) == (65, 130)
    assert "from" not in short["recurrence"]["both"]
    assert long["recurrence"]["both"]["from"] == 65
    for name in ("attention", "recurrence"):
        assert long["times_faster"][name]["both"] > 0
