"""Run the core of the suite on the oldest and the newest versions that pyproject.toml allows.

make versions                           both ends of the ranges
make versions ARGS="newest"             one of them
make versions ARGS="torch=2.14.1 torch=2.11.0,transformers=5.24.0"
                                        others; what is not named is the newest
make versions ARGS="--all newest"       the whole suite instead of its core

An environment for each lies in .versions/ and is used again. Results are kept in
docs/versions.json, one for each combination, and the README's table is written from it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scripts.uv import FOLDER, ROOT, pins, resolve, uv

RESULTS = ROOT / "docs/versions.json"
PACKAGES = ("torch", "transformers", "megatron-core")
# Every unit, and of what spans processes the parts that lean on these packages' insides.
CORE = (
    "tests/unit",
    "tests/overlay",
    "tests/distributed/backend",
    "tests/distributed/convert",
    "tests/distributed/core/test_documents.py",
    "tests/distributed/core/test_equivalence.py",
    "tests/distributed/core/test_graphs_and_waits.py",
    "tests/distributed/inference/test_generation.py",
    "tests/distributed/lora/test_peft.py",
    "tests/distributed/models",
    "tests/distributed/layers/test_attention.py",
    "tests/distributed/training/test_parallel_flags.py",
)
BEGIN, END = "<!-- Written by `make versions`; do not edit. -->\n", "<!-- end of versions -->\n"


def main(arguments: list[str]) -> None:
    """Run each combination, keep its result, print the table; exits with 1 where a test failed."""
    if {"-h", "--help"} & set(arguments):
        sys.exit(__doc__)
    names = [argument for argument in arguments if argument != "--all"] or ["oldest", "newest"]
    whole = "--all" in arguments
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    combinations = [wanted(name, project) for name in names]
    found = []
    for combination in combinations:
        found.append(run(combination, whole))
        kept = merge(json.loads(RESULTS.read_text()) if RESULTS.exists() else [], found[-1])
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(), table(kept)))
    print(table(found))
    sys.exit(any(result["failed"] for result in found))


def wanted(name: str, project: dict[str, Any]) -> dict[str, str]:
    """Package -> exact version for `oldest`, `newest` or `torch=2.14.1,...`.

    Raises:
        SystemExit: a name that is none of these.
    """
    if name == "newest":
        return {}
    if name == "oldest":
        return oldest(project)
    chosen = dict(part.partition("=")[::2] for part in name.split(","))
    if not set(chosen) <= set(PACKAGES) or not all(chosen.values()):
        sys.exit(f"'{name}' is no combination; expected oldest, newest or {'=X,'.join(PACKAGES)}=X")
    return chosen


def oldest(project: dict[str, Any]) -> dict[str, str]:
    """The lower bounds that pyproject.toml declares."""
    extras = project["project"]["optional-dependencies"].values()
    declared = [*project["project"]["dependencies"], *(one for extra in extras for one in extra)]
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(declared), flags=re.MULTILINE))
    return {name: bounds[name] for name in PACKAGES}


def run(combination: dict[str, str], whole: bool) -> dict[str, Any]:
    """The result of the suite with these versions and the newest of everything else."""
    FOLDER.mkdir(exist_ok=True)
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in combination.items()))
    resolved = resolve(f"--python={sys.executable}", f"--constraint={constraints}")
    versions = {name: pins(resolved)[name] for name in PACKAGES}
    names = {**versions, "python": platform.python_version()}
    environment = prepare("_".join(map("-".join, names.items())), resolved)
    print(f"== {names}: {'the whole suite' if whole else 'core'}", flush=True)
    report = environment / "report.xml"
    report.unlink(missing_ok=True)
    suite = [environment / "bin/python", "-m", "pytest", "-q", "--wide", f"--junitxml={report}"]
    settings = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([*suite, *(() if whole else CORE)], cwd=ROOT, env=settings)
    return {
        **names,
        "ran": "whole suite" if whole else "core",
        **counts(report),
        "date": datetime.date.today().isoformat(),
    }


def prepare(name: str, requirements: str) -> Path:
    """The environment of that name with exactly these requirements, made where it is not."""
    environment = FOLDER / name
    ready = environment / "requirements.txt"
    if not ready.exists() or ready.read_text() != requirements:
        print(f"== making {environment.relative_to(ROOT)}", flush=True)
        uv("venv", "--quiet", "--clear", "--seed", f"--python={sys.executable}", environment)
        listed = FOLDER / "requirements.txt"
        listed.write_text(requirements)
        into = ("pip", "install", "--quiet", f"--python={environment}")
        uv(*into, "--requirement", listed)
        uv(*into, "--no-deps", "--no-build-isolation", "--editable", ".")
        listed.rename(ready)
    return environment


def counts(report: Path) -> dict[str, int]:
    """Passed and failed tests of a JUnit report.

    Raises:
        SystemExit: the suite ended without one.
    """
    if not report.exists():
        sys.exit("the suite wrote no report; see above")
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, skipped, failures, errors = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "skipped", "failures", "errors")
    )
    failed = failures + errors
    return {"passed": tests - skipped - failed, "failed": failed}


def merge(kept: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The results with a new one, newest versions first; one for each combination and set."""

    def key(result: dict[str, Any]) -> tuple[Any, ...]:
        numbers = [re.findall(r"\d+", result[name]) for name in (*PACKAGES, "python")]
        return (*([int(part) for part in number] for number in numbers), result["ran"])

    others = [result for result in kept if key(result) != key(new)]
    return sorted([*others, new], key=key, reverse=True)


def table(results: Iterable[dict[str, Any]]) -> str:
    """Results as a table in Markdown."""
    columns = [*PACKAGES, "Python", "ran", "result", "date"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for result in results:
        outcome = f"{result['passed']} passed"
        if result["failed"]:
            outcome += f", **{result['failed']} failed**"
        cells = [result[name] for name in (*PACKAGES, "python", "ran")]
        lines.append("| " + " | ".join([*cells, outcome, result["date"]]) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, written: str) -> str:
    """The README with this table in the place of the one before."""
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:begin] + written + readme[end:]


if __name__ == "__main__":
    main(sys.argv[1:])
