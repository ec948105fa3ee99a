"""The patcher on a small package of its own: modules imported before, later, and by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron.mimo.backend.patch import EVERY, VIEW, Patch
from megatron.mimo.backend.patching import Patcher, _PatchingFinder

PACKAGE = "megatron.patching_probe"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``megatron.patching_probe`` with a module that defines and one that imports by name."""
    folder = tmp_path / "megatron" / "patching_probe"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "defines.py").write_text("import torch\ndef answer():\n    return 'stock'\n")
    (folder / "imports.py").write_text(f"from {PACKAGE}.defines import answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _PatchingFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    yield folder
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


PATCH = Patch(
    name="answer",
    target=f"{PACKAGE}.defines:answer",
    reason="test",
    replacement=lambda original: lambda: f"not {original()}",
)


def _answers() -> list[str]:
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in ("imports", "defines")]
    return [module.answer() for module in modules]


@pytest.mark.parametrize("imported_before", [False, True])
def test_patch_reaches_every_name(package: Path, imported_before: bool) -> None:
    if imported_before:
        assert _answers() == ["stock", "stock"]
    patcher = Patcher()
    patcher.apply([PATCH])
    assert _answers() == ["not stock", "not stock"]
    assert patcher.originals[PATCH.target]() == "stock"
    patcher.apply([PATCH])
    assert _answers() == ["not stock", "not stock"]


def test_without_a_view_torch_stays(package: Path) -> None:
    Patcher().apply([PATCH])
    assert vars(importlib.import_module(f"{PACKAGE}.defines"))["torch"] is torch


def test_view_replaces_torch_in_megatron_only(package: Path) -> None:
    view = ModuleType("torch")
    patch = Patch(name="n", target=f"{VIEW}:n", reason="test", replacement=lambda _: 3)
    early = importlib.import_module(f"{PACKAGE}.defines")
    before = {
        name: vars(module).get("torch")
        for name, module in list(sys.modules.items())
        if module is not None  # a package that is hidden
    }
    patcher = Patcher()
    patcher.view = view
    patcher._install(patch, view)
    patcher.patches.append(
        Patch(
            name="torch",
            target=f"{EVERY}:torch",
            reason="test",
            replacement=lambda value: view if value is torch else value,
        )
    )
    patcher.adapt(early)
    assert vars(early)["torch"] is view
    assert view.n == 3
    del before[early.__name__]
    assert all(vars(sys.modules[name]).get("torch") is seen for name, seen in before.items())


def test_a_module_keeps_its_loader_and_source(package: Path) -> None:
    Patcher().apply([PATCH])
    module = importlib.import_module(f"{PACKAGE}.defines")
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert module.__file__ == str(package / "defines.py")


def test_a_missing_module_is_reported_as_usual(package: Path) -> None:
    Patcher().apply([PATCH])
    with pytest.raises(ModuleNotFoundError, match=r"patching_probe\.absent"):
        importlib.import_module(f"{PACKAGE}.absent")
