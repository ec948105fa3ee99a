"""Real environments, cheap to make: each has its own megatron-core and borrows everything else.

A virtual environment of its own, without pip (the suite's pip acts on it from outside), holds a
copy of the installed megatron-core, made of hard links. All other packages come through a path file
that points to a folder of links to the suite's packages. This project is left out of it, so what an
environment knows of megatron-mimo is what was installed into it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tests.time_limits import HANG

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
NOT_BORROWED = ("megatron", "__editable__", "__pycache__", "pip")


def run(
    command: Sequence[str | Path], *, cwd: Path, environment: dict[str, str] | None = None
) -> str:
    """Runs a command with nothing of the suite's Python settings and returns its stdout."""
    clean = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    clean.pop("MEGATRON_MIMO_OVERLAY", None)
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean | (environment or {}),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def copy_megatron_core(target: Path) -> None:
    """Puts the installed megatron-core, metadata included, into the folder ``target``."""
    core = distribution("megatron-core")
    files = core.files
    assert files, "the installed megatron-core has no RECORD"
    folders = {file.parts[0] for file in files if file.parts[0].startswith("megatron")}
    for folder in folders:
        source = Path(str(core.locate_file(folder)))
        shutil.copytree(source, target / folder, copy_function=link_or_copy, dirs_exist_ok=True)


def copy_checkout(target: Path) -> Path:
    """Copies what a distribution is built from, so that no test writes into the checkout."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    shutil.copytree(
        ROOT / "megatron", target / "megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    return target


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment; ``neutral`` is an empty folder to run from."""

    folder: Path
    neutral: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def pip(self, *arguments: str | Path) -> str:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        return run([*pip, "--disable-pip-version-check", *arguments], cwd=self.neutral)

    def install(self, *what: str | Path) -> str:
        return self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def probe(self, *, cwd: Path | None = None, **environment: str) -> dict[str, Any]:
        """Imports MimoModel in a fresh process of this environment; see ``probe.py``."""
        # By text and not by path: the folder of a script would come first on sys.path.
        command = [str(self.python), "-W", "ignore", "-c", PROBE.read_text(encoding="utf-8")]
        output = run(command, cwd=cwd or self.neutral, environment=environment)
        facts: dict[str, Any] = json.loads(output.splitlines()[-1])
        return facts


def make_environment(folder: Path) -> Environment:
    borrowed = folder.parent / "borrowed"
    if not borrowed.exists():
        borrowed.mkdir()
        for entry in SITE_PACKAGES.iterdir():
            if not entry.name.startswith(NOT_BORROWED):
                (borrowed / entry.name).symlink_to(entry)
    neutral = folder.parent / "neutral"
    neutral.mkdir(exist_ok=True)
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder=folder, neutral=neutral)
    copy_megatron_core(environment.site_packages)
    (environment.site_packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return environment
