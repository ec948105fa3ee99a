"""`make versions` and `make lock`: what runs, what is kept, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import lock, versions

PROJECT = {
    "project": {
        "dependencies": ["torch>=2.11", "megatron-core>=0.19,<0.20", "numpy"],
        "optional-dependencies": {"hf": ["transformers>=5.20", "peft"], "dev": ["ruff>=0.9"]},
    }
}
OLDEST = {"torch": "2.11", "transformers": "5.20", "megatron-core": "0.19"}


def result(torch: str, date: str, failed: int = 0, ran: str = "core") -> dict[str, Any]:
    others = {"transformers": "5.24.0", "megatron-core": "0.19.2", "python": "3.12.1"}
    return {"torch": torch, **others, "ran": ran, "passed": 7, "failed": failed, "date": date}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("oldest", OLDEST),
        ("newest", {}),
        ("torch=2.14.1", {"torch": "2.14.1"}),
        ("torch=2.11,megatron-core=0.19.0", {"torch": "2.11", "megatron-core": "0.19.0"}),
    ],
)
def test_combinations(name: str, expected: dict[str, str]) -> None:
    assert versions.wanted(name, PROJECT) == expected


@pytest.mark.parametrize("name", ["old", "torch", "torch=", "numpy=2.0", "torch=2.11,old"])
def test_what_is_no_combination_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match=f"'{name}' is no combination; expected oldest, newest or"):
        versions.wanted(name, PROJECT)


def test_a_result_takes_the_place_of_an_earlier_one() -> None:
    kept = [result("2.11.0", "2026-01-01", failed=3), result("2.9.0", "2026-01-01")]
    kept = versions.merge(kept, result("2.15.0", "2026-02-01"))
    kept = versions.merge(kept, result("2.11.0", "2026-02-02"))
    kept = versions.merge(kept, result("2.11.0", "2026-02-03", ran="whole suite"))
    assert [(one["torch"], one["date"], one["ran"]) for one in kept] == [
        ("2.15.0", "2026-02-01", "core"),
        ("2.11.0", "2026-02-03", "whole suite"),
        ("2.11.0", "2026-02-02", "core"),
        ("2.9.0", "2026-01-01", "core"),
    ]


def test_the_table() -> None:
    written = versions.table([result("2.15.0", "2026-02-01"), result("2.11.0", "2026-02-02", 2)])
    assert written == (
        "| torch | transformers | megatron-core | Python | ran | result | date |\n"
        "|---|---|---|---|---|---|---|\n"
        "| 2.15.0 | 5.24.0 | 0.19.2 | 3.12.1 | core | 7 passed | 2026-02-01 |\n"
        "| 2.11.0 | 5.24.0 | 0.19.2 | 3.12.1 | core | 7 passed, **2 failed** | 2026-02-02 |\n"
    )
    readme = f"before\n{versions.BEGIN}old\n{versions.END}after\n"
    expected = f"before\n{versions.BEGIN}{written}{versions.END}after\n"
    assert versions.with_table(readme, written) == expected


def test_counts_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    with pytest.raises(SystemExit, match="wrote no report"):
        versions.counts(report)
    report.write_text(
        '<testsuites><testsuite tests="10" skipped="2" failures="1" errors="3"/></testsuites>'
    )
    assert versions.counts(report) == {"passed": 4, "failed": 4}


def test_the_parts_of_the_core_exist() -> None:
    assert [part for part in versions.CORE if not (versions.ROOT / part).exists()] == []


def test_the_header_of_a_lock() -> None:
    downloads = {"torch": 10**9, "nvidia-cublas": 2 * 10**9, "triton": 10**8, "numpy": 10**8}
    disk = {name: 2 * size for name, size in downloads.items()}
    written = lock.header(downloads, disk)
    assert "\n# cuda: 3.2 GB to download, 6.4 GB on disk\n" in written
    assert "\n# cpu: 0.3 GB to download, 0.9 GB on disk\n" in written
