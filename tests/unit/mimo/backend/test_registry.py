"""The registry: what it lists, what docs say, how patches come and go, what a lacking name says."""

from __future__ import annotations

import importlib
import sys
import tomllib
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

from megatron.mimo.backend import hooks, select_backend
from megatron.mimo.backend.patch import MADE_FOR, Patch, PatchError, Scope
from megatron.mimo.backend.patching import Patcher, replace_in, replaced
from megatron.mimo.backend.registry import REGISTRY, describe

ROOT = Path(__file__).resolve().parents[4]
FOR_A_TIME = [patch for patch in REGISTRY if patch.scope in (Scope.RUN, Scope.CALL)]


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    select_backend("cpu")


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of megatron-core that has one function, ``answer``."""
    module = ModuleType("megatron.registry_probe")
    vars(module)["answer"] = lambda: "stock"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return module


def a_patch(attribute: str, scope: Scope = Scope.PROCESS) -> Patch:
    return Patch(
        name="probe",
        target=f"megatron.registry_probe:{attribute}",
        reason="test",
        scope=scope,
        replacement=lambda original: lambda: f"not {original()}",
    )


def test_each_target_has_one_patch_with_a_name_and_a_reason() -> None:
    assert len({patch.name for patch in REGISTRY}) == len(REGISTRY)
    assert len({patch.target for patch in REGISTRY}) == len(REGISTRY)
    assert all(patch.reason and patch.made_for for patch in REGISTRY)


def test_the_page_on_it_is_what_it_says() -> None:
    page = (ROOT / "docs/replaced.md").read_text(encoding="utf-8")
    remedy = "write what `python -m megatron.mimo.backend` prints into docs/replaced.md"
    assert page.endswith(f"\n\n{describe()}"), remedy


def test_patches_are_made_for_the_versions_that_may_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {required.name: required for required in map(Requirement, project["dependencies"])}
    asked["python"] = Requirement(f"python{project['requires-python']}")
    for made_for in map(Requirement, MADE_FOR.values()):
        assert made_for.specifier == asked[made_for.name].specifier
        assert made_for.name == "pillow" or made_for.specifier
    assert all(patch.fits() for patch in REGISTRY)


def test_every_hook_is_put_in_place_somewhere() -> None:
    named = {name: patch for name, patch in vars(hooks).items() if isinstance(patch, Patch)}
    assert set(named.values()) == set(hooks.HOOKS)
    sources = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "megatron/mimo").rglob("*.py")
        if path.name != "hooks.py"
    ]
    unused = [name for name in named if not any(name in source for source in sources)]
    assert unused == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("patch", FOR_A_TIME, ids=lambda patch: patch.name)
def test_a_patch_for_a_time_is_there_and_then_gone(patch: Patch, fails: bool) -> None:
    owner, name = patch.locate(importlib.import_module(patch.module))
    before, seen = vars(owner)[name], []

    def stand_in(original: Any) -> object:
        seen.append(original)
        return [original]

    try:
        with replaced({patch: stand_in}):
            assert vars(owner)[name] == [before]
            with replaced({patch: stand_in}):
                assert vars(owner)[name] == [[before]]
            assert vars(owner)[name] == [before]
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert vars(owner)[name] is before
    assert seen == [before, [before]]


def test_a_patch_that_fails_leaves_those_before_it_off(foreign: ModuleType) -> None:
    stock = foreign.answer
    patches = {
        a_patch("answer", Scope.RUN): lambda _: 3,
        a_patch("gone", Scope.RUN): lambda _: 4,
    }
    with pytest.raises(PatchError, match="probe:gone is not there"), replaced(patches):
        pass
    assert foreign.answer is stock


def test_a_name_that_has_to_be_there_is_an_error(foreign: ModuleType) -> None:
    message = (
        r"megatron\.registry_probe:gone is not there to be replaced \(probe\); expected "
        r"megatron-core>=0\.19,<0\.20, got megatron-core 0\.19\S*; install a version of this range"
    )
    for attribute in ("gone", "gone.method"):
        with pytest.raises(PatchError, match=message.replace("gone", attribute)):
            Patcher().apply([a_patch(attribute)])


def test_a_name_that_another_version_lacks_is_left_out(
    foreign: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.21.0")
    patcher, patches = Patcher(), [a_patch("gone"), a_patch("answer")]
    with pytest.warns(UserWarning, match=r"got megatron-core 0\.21\.0; install"):
        patcher.apply(patches)
    assert list(patcher.skipped) == [patches[0].target]
    assert foreign.answer() == "not stock"  # what is there is replaced in any version
    of_a_run = {a_patch("gone", Scope.RUN): lambda _: 3}
    with pytest.raises(PatchError), replaced(of_a_run):  # a run counts on what it replaces
        pass


def test_one_object_is_another_and_the_rest_stay() -> None:
    parsers = ArgumentParser(), ArgumentParser()
    replace_in(parsers[0], hooks.PARSER_ERROR, lambda original: lambda text: (original, text))
    original, text = parsers[0].error("wrong")  # type: ignore[func-returns-value]
    assert (original.__func__, text) == (ArgumentParser.error, "wrong")
    assert parsers[1].error.__func__ is ArgumentParser.error  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match=r"argparse:ArgumentParser\.error in a list"):
        replace_in([], hooks.PARSER_ERROR, lambda _: None)
