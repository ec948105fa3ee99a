"""`make setup`: what it installs, from which versions, and when it does so again.

The scripts and pip are the real ones; the project, torch and torchvision are tiny wheels.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.time_limits import HANG

pytestmark = pytest.mark.slow  # processes and installations

ROOT = Path(__file__).resolve().parents[3]
HAS_GPU_DRIVER = any(
    Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
) or bool(shutil.which("nvidia-smi"))

LOCK = """\
# cuda: 3.2 GB to download, 6.2 GB on disk
# cpu: 0.4 GB to download, 1.4 GB on disk
torch==2.0
torchvision==1.0 ; sys_platform == 'linux'
"""
PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# Builds the project without setuptools, which an index would have to offer.
BACKEND = """
import zipfile
from pathlib import Path
{write_wheel}
def build_editable(folder, config_settings=None, metadata_directory=None):
    needs = "Requires-Dist: torch\\nRequires-Dist: torchvision; extra == 'dev'\\n"
    needs += "Provides-Extra: dev\\n"
    return write_wheel(folder, "project", "1", needs, module="megatron/core/__init__.py")
"""


def write_wheel(folder, name, version, needs="", module="{name}.py"):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Writes a wheel of one module into the folder and returns its file name."""
    info = f"{name}-{version}.dist-info"
    files = {
        module.format(name=name): f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / file, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(
            f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        )
    return file


class Project:
    """A checkout with the real scripts, and an index that offers torch 1.0, 2.0 and 3.0."""

    def __init__(self, folder: Path) -> None:
        self.root, self.index = folder / "a checkout", folder / "index"
        self.index.mkdir()
        for version in ("1.0", "2.0", "3.0"):
            write_wheel(self.index, "torch", version)
        for version in ("1.0", "1.1"):
            write_wheel(self.index, "torchvision", version)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        texts = {
            "requirements.lock": LOCK,
            "pyproject.toml": PYPROJECT,
            "setup.py": "",
            "backend.py": BACKEND.format(write_wheel=inspect.getsource(write_wheel)),
        }
        for name, text in texts.items():
            (self.root / name).write_text(text)
        # As a company or a machine may set it; the lock asks for a version that this forbids.
        (folder / "constraints.txt").write_text("torch<2\n")
        self.configuration = folder / "pip.conf"
        self.configuration.write_text(f"[global]\nconstraint = {folder}/constraints.txt\n")

    def setup(self, **given: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PIP_", "PYTHON", "LATEST"))
        }
        settings = {
            "PIP_CONFIG_FILE": str(self.configuration),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PYTHON": sys.executable,
        }
        return subprocess.run(
            ["scripts/setup"],
            cwd=self.root,
            env=kept | settings | given,
            capture_output=True,
            text=True,
            timeout=HANG,
        )

    def run(self, **given: str) -> str:
        done = self.setup(**given)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def versions(self) -> tuple[str, str]:
        """Of torch and torchvision, as installed."""
        (packages,) = self.root.glob(".venv/lib/python3.*/site-packages")
        found = {one.name: one.version for one in distributions(path=[str(packages)])}
        return found["torch"], found["torchvision"]

    def change_lock(self, old: str, new: str) -> None:
        lock = self.root / "requirements.lock"
        lock.write_text(lock.read_text().replace(old, new))


@pytest.mark.wide
def test_versions_are_those_asked_for(tmp_path: Path) -> None:
    """One environment from its making on: each call meets what the calls before it left."""
    project = Project(tmp_path)

    told = project.run()
    assert project.versions() == ("2.0", "1.0")
    assert told.index("setup: 3.2 GB to download") < told.index("Looking in links")
    assert "6.2 GB in .venv" in told
    assert "about 6 minutes at 100 Mbit/s" in told
    assert ("offer no CPU build" in told) == (not HAS_GPU_DRIVER)
    assert project.run() == ""
    project.change_lock("torchvision==1.0", "torchvision==1.1")
    assert "GB" not in project.run()
    assert project.versions() == ("2.0", "1.1")

    # The newest of what the user's pip may take, for as long as nobody asks for the lock again.
    assert "the newest versions" in project.run(LATEST="1")
    assert project.versions() == ("1.0", "1.1")
    assert project.run() == ""
    project.change_lock("torchvision==1.1", "torchvision==1.0")
    assert project.run() == ""
    (project.root / ".venv/.ready").unlink()
    assert "the newest versions" in project.run(PIP_CONFIG_FILE=os.devnull)
    assert project.versions() == ("3.0", "1.1")
    assert "the newest versions" in project.run(LATEST="1", PIP_CONFIG_FILE=os.devnull)
    project.run(LATEST="0")
    assert project.versions() == ("2.0", "1.0")
    assert project.run() == ""

    refused = project.setup(LATEST="yes")
    assert refused.returncode == 2
    assert "LATEST is 'yes'; expected 1" in refused.stderr


@pytest.mark.wide
@pytest.mark.skipif(HAS_GPU_DRIVER, reason="needs a machine without a GPU")
def test_a_cpu_build_is_taken_where_there_is_one(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for name, version in [("torch", "2.0+cpu"), ("torch", "2.0+cu1"), ("torchvision", "1.0+cpu")]:
        write_wheel(project.index, name, version)
    told = project.run()
    assert project.versions() == ("2.0+cpu", "1.0+cpu")
    assert "setup: 0.4 GB to download" in told
    assert "1.4 GB in .venv" in told
    assert "taking the CPU build" in told


@pytest.mark.parametrize("offered", ["2.0+cpu", "2.0+cu1"])
def test_half_a_cpu_build_is_none(tmp_path: Path, offered: str) -> None:
    project = Project(tmp_path)
    write_wheel(project.index, "torch", offered)
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.index)}
    done = subprocess.run(
        ["scripts/cpu_torch", sys.executable, "requirements.lock"],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    assert done.stdout == ""
