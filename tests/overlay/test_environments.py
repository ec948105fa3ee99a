"""Which MIMO one gets in the situations in which people are, each a real environment."""

from __future__ import annotations

import csv
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.overlay.environment import (
    Environment,
    copy_checkout,
    copy_megatron_core,
    make_environment,
    run,
)
from tests.structure.test_structure import PUBLIC_NAMES

LIBRARY = PurePosixPath("megatron/core/models/mimo")
LIBRARY_IN_WHEEL = PurePosixPath("megatron/mimo/_overlay/mimo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlay")


@pytest.fixture(scope="module")
def checkout(folder: Path) -> Path:
    return copy_checkout(folder / "check out")


@pytest.fixture(scope="module")
def wheel(folder: Path, checkout: Path) -> Path:
    """The wheel as ``python -m build`` makes it: an sdist first, the wheel from the sdist."""
    builder = make_environment(folder / "builder")
    target = folder / "dist"
    run([builder.python, "-m", "build", "--no-isolation", "--outdir", target], cwd=checkout)
    (built,) = target.glob("*.whl")
    return built


def assert_ours(facts: dict[str, Any], library: Path) -> None:
    assert Path(facts["mimo"]) == library / "__init__.py"
    assert Path(facts["model"]).is_relative_to(library)
    assert facts["mimo_name"] == "megatron.core.models.mimo"
    assert facts["model_module"].startswith("megatron.core.models.mimo.")
    assert set(facts["public_names"]) == PUBLIC_NAMES


def assert_stock(facts: dict[str, Any], tree: Path) -> None:
    assert Path(facts["mimo"]) == tree / LIBRARY / "__init__.py"
    assert Path(facts["model"]).is_relative_to(tree / LIBRARY)


def test_from_the_root_of_a_checkout(folder: Path, checkout: Path) -> None:
    environment = make_environment(folder / "bare")
    facts = environment.probe(cwd=checkout)
    assert_ours(facts, checkout / LIBRARY)
    assert Path(facts["core"]).is_relative_to(environment.site_packages)
    assert facts["loaded_by_core"] == []


@pytest.mark.wide
def test_editable_install(folder: Path, checkout: Path) -> None:
    environment = make_environment(folder / "editable")
    environment.install("--editable", checkout)
    facts = environment.probe()
    assert_ours(facts, checkout / LIBRARY)
    assert Path(facts["core"]).is_relative_to(environment.site_packages)


@pytest.fixture(scope="module")
def installed(folder: Path, wheel: Path) -> Environment:
    """One environment through its life: installed, with another tree in front, uninstalled."""
    environment = make_environment(folder / "wheel")
    environment.install(wheel)
    return environment


@pytest.mark.wide
def test_wheel_installed(installed: Environment) -> None:
    facts = installed.probe()
    assert_ours(facts, installed.site_packages / LIBRARY_IN_WHEEL)
    assert facts["path"] == [str(installed.site_packages / "megatron")]
    assert Path(facts["core"]).is_relative_to(installed.site_packages)
    assert facts["loaded_by_core"] == []
    # Importing megatron costs next to nothing: itself, and a few modules of the standard library.
    foreign = {name.partition(".")[0] for name in facts["loaded_by_megatron"]}
    assert foreign - sys.stdlib_module_names == {"megatron"}
    assert len(facts["loaded_by_megatron"]) < 30


@pytest.mark.wide
def test_another_tree_in_front(installed: Environment, folder: Path) -> None:
    """Its modules win, as PYTHONPATH promises, but MIMO is ours even if that tree has one."""
    tree = folder / "tree"
    copy_megatron_core(tree)
    facts = installed.probe(PYTHONPATH=str(tree))
    assert Path(facts["core"]).is_relative_to(tree)
    assert Path(facts["training"]).is_relative_to(tree)
    assert facts["path"] == [str(tree / "megatron"), str(installed.site_packages / "megatron")]
    assert_ours(facts, installed.site_packages / LIBRARY_IN_WHEEL)


@pytest.mark.wide
def test_switched_off(installed: Environment) -> None:
    assert_stock(installed.probe(MEGATRON_MIMO_OVERLAY="0"), installed.site_packages)


@pytest.mark.wide
def test_uninstalled(installed: Environment) -> None:
    """Last, for it ends the environment: megatron-core is whole and its own MIMO works."""
    installed.pip("uninstall", "--yes", "megatron-mimo")
    missing = [file for file in core_files() if not (installed.site_packages / file).exists()]
    assert missing == []
    assert not (installed.site_packages / "megatron/__init__.py").exists()
    facts = installed.probe()
    assert facts["megatron"] is None
    assert_stock(facts, installed.site_packages)


def core_files() -> set[str]:
    """What megatron-core's wheel owns, without what pip adds to its metadata on installation."""
    record = distribution("megatron-core").read_text("RECORD")
    assert record
    return {row[0] for row in csv.reader(record.splitlines()) if row[0].startswith("megatron/")}


def test_wheel_owns_no_file_of_megatron_core(wheel: Path) -> None:
    assert len(core_files()) > 500
    assert core_files() & set(zipfile.ZipFile(wheel).namelist()) == set()


def test_wheel_holds_every_file_of_the_packages(wheel: Path, checkout: Path) -> None:
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("megatron/")}
    in_checkout = {
        PurePosixPath(path.relative_to(checkout))
        for path in (checkout / "megatron").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    moved = {
        LIBRARY_IN_WHEEL / path.relative_to(LIBRARY) if path.is_relative_to(LIBRARY) else path
        for path in in_checkout
    }
    assert in_wheel == {str(path) for path in moved}


def test_wheel_built_without_an_sdist_is_the_same(
    wheel: Path, folder: Path, checkout: Path
) -> None:
    builder = Environment(folder=folder / "builder", neutral=folder)
    target = folder / "direct"
    run([builder.python, "-m", "build", "--wheel", "-n", "--outdir", target], cwd=checkout)
    (direct,) = target.glob("*.whl")
    assert set(zipfile.ZipFile(direct).namelist()) == set(zipfile.ZipFile(wheel).namelist())
