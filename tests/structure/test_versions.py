"""The lock, the ranges of pyproject.toml and the README's table of versions say the same."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.uv import ROOT, pins
from scripts.versions import BEGIN, END, PACKAGES, oldest, table

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs/versions.json").read_text(encoding="utf-8"))


def installed_by_setup(project: dict[str, Any], extra: str = "dev") -> Iterator[str]:
    """The requirements of the project and of an extra, those of extras that it names included."""
    optional = project["optional-dependencies"]
    for text in [*project["dependencies"], *optional[extra]] if extra == "dev" else optional[extra]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for name in requirement.extras:
                yield from installed_by_setup(project, name)
        else:
            yield text


def out_of_step(requirements: Iterable[str], lock: str) -> list[str]:
    """Requirements that the lock does not fix, or fixes to a version that they exclude."""
    locked = {canonicalize_name(name): version for name, version in pins(lock).items()}
    complaints = []
    for text in requirements:
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            complaints.append(f"{text} is locked to {version}; run make lock")
    return complaints


def foreign_lines(lock: str) -> list[str]:
    """Lines that are neither a comment without an address nor one exact version."""
    exact = re.compile(r"[\w.-]+==[\w.+!]+( ; [\w.'\"<>=! ()]+)?")
    return [
        line
        for line in lock.splitlines()
        if "/" in line or not (line.startswith("#") or exact.fullmatch(line))
    ]


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    asked = list(installed_by_setup(PROJECT["project"]))
    assert {"torchvision", "av", "pytest>=9.0"} <= set(asked)
    assert out_of_step(asked, LOCK) == []


def test_the_lock_names_versions_and_no_index() -> None:
    assert foreign_lines(LOCK) == []
    for build in ("cuda", "cpu"):
        size = r"[0-9.]+ GB"
        assert re.search(rf"^# {build}: {size} to download, {size} on disk$", LOCK, re.MULTILINE)


@pytest.mark.parametrize(
    ("requirement", "lock", "fits"),
    [
        ("torch>=2.11", "torch==2.15.0\n", True),
        ("torch>=2.11", "torch==2.10.0\n", False),
        ("torch>=2.11", "torchvision==2.15.0\n", False),
        ("types-PyYAML", "types-pyyaml==6.0.12.20261122 ; sys_platform == 'linux'\n", True),
        ("megatron-core>=0.19,<0.20", "megatron-core==0.20.0\n", False),
    ],
)
def test_a_lock_that_is_out_of_step_is_found(requirement: str, lock: str, fits: bool) -> None:
    assert (out_of_step([requirement], lock) == []) == fits


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://index.example/simple",
        "# from https://index.example",
        "torch @ file:///wheels/torch.whl",
        "torch>=2.11",
        "torch==2.15.0 --hash=sha256:00",
    ],
)
def test_what_does_not_belong_in_a_lock_is_found(line: str) -> None:
    assert foreign_lines(f"# a lock\ntorch==2.15.0\n{line}\n") == [line]


def test_the_readme_shows_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)] == table(RESULTS)


@pytest.mark.parametrize("which", ["oldest", "locked"])
def test_both_ends_of_the_ranges_have_passed(which: str) -> None:
    """Run `make versions` when this fails: the bounds or the lock moved."""
    wanted = oldest(PROJECT) if which == "oldest" else pins(LOCK)
    passed = [
        result
        for result in RESULTS
        if all(Version(result[name]) == Version(wanted[name]) for name in PACKAGES)
    ]
    assert passed
    assert all(result["failed"] == 0 and result["passed"] > 500 for result in passed)
