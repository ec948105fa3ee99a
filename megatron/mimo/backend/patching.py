"""Puts patches in place: in this process for good, for the time of a block, or in one object.

A patch of a ``megatron.*`` module is applied when the module is imported, or at once if it already
is; one of another module, at once.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from megatron.mimo.backend.patch import EVERY, VIEW, Patch, PatchError, Scope

__all__ = ["PROCESS", "Patcher", "replace_in", "replaced"]

_PATCHED_PACKAGE = "megatron."
_OWN_PACKAGES = ("megatron.mimo",)


class Patcher:
    """Applies patches to loaded modules and, by a meta-path finder, to those imported later.

    Attributes:
        patches: all that were applied.
        originals: the target of every patch that has taken effect -> what stood there before.
        skipped: the target of every patch that could not -> why: the installed version is not one
            that it is made for, and has no such name.
        view: what stands in for ``torch`` in the targets of ``VIEW``.
    """

    def __init__(self) -> None:
        self.patches: list[Patch] = []
        self.originals: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.view: ModuleType | None = None
        self._names: set[str] = set()  # of the modules that may be patched
        self._finder = _PatchingFinder(self)

    def apply(self, patches: Iterable[Patch], view: ModuleType | None = None) -> None:
        """Adds ``patches``; those whose target has one already are left out.

        Raises:
            PatchError: a name is not there, in a version that has to have it.
        """
        known = {patch.target for patch in self.patches}
        new = [patch for patch in patches if patch.target not in known]
        self.patches += new
        self.view = view or self.view
        if self._finder not in sys.meta_path:
            sys.meta_path.insert(0, self._finder)
            self._names.update(filter(_is_patched_module, list(sys.modules)))
        for patch in new:
            if patch.module == VIEW and self.view is not None:
                self._install(patch, self.view)
            elif patch.module not in (VIEW, EVERY) and not _is_patched_module(patch.module):
                self._install(patch, importlib.import_module(patch.module))
        if new:
            for module in list(self._loaded_modules()):
                self.adapt(module, new)

    def knows(self, name: str) -> None:
        """A module of this name is about to be imported."""
        self._names.add(name)

    def adapt(self, module: ModuleType, patches: Iterable[Patch] | None = None) -> None:
        """Applies to ``module``, which has been executed, what of ``patches`` (all) concerns it."""
        for patch in self.patches if patches is None else patches:
            done = patch.target in self.originals or patch.target in self.skipped
            if patch.module == EVERY:
                _replace_each(patch, module)
            elif patch.module == module.__name__ and not done:
                self._install(patch, module)

    def _install(self, patch: Patch, module: ModuleType) -> None:
        try:
            owner, name = patch.locate(module)
        except PatchError as error:
            if patch.fits():
                raise
            self.skipped[patch.target] = str(error)
            warnings.warn(str(error), stacklevel=2)
            return
        original = _standing(owner, name)
        replacement = _replacement(patch)(original)
        self.originals[patch.target] = original
        setattr(owner, name, replacement)
        if isinstance(original, FunctionType):
            self._rebind(original, replacement)

    def _rebind(self, original: object, replacement: object) -> None:
        """Modules that imported ``original`` by name get ``replacement`` too."""
        for module in self._loaded_modules():
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, replacement)

    def _loaded_modules(self) -> Iterator[ModuleType]:
        """The ``megatron.*`` modules whose execution has finished.

        Others are not looked at: that would copy the memory of each in a process that was forked.
        """
        for name in list(self._names):
            module = sys.modules.get(name)
            if isinstance(module, ModuleType) and not _is_executing(module):
                yield module


@contextmanager
def replaced(replacements: Mapping[Patch, Callable[[Any], Any]]) -> Iterator[None]:
    """Puts patches in place for the time of the block, and takes them off, the last one first.

    Args:
        replacements: patch -> what is called with the original and returns what stands in.

    Raises:
        PatchError: a name is not there, whatever the version: a run counts on what it replaces.
    """
    with ExitStack() as undo:
        for patch, replacement in replacements.items():
            assert patch.scope in (Scope.RUN, Scope.CALL), patch
            owner, name = patch.locate(importlib.import_module(patch.module))
            original = _standing(owner, name)
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, replacement(original))
        yield


def replace_in(owner: Any, patch: Patch, replacement: Callable[[Any], Any]) -> None:
    """Puts a patch in place in one object, of the class that the patch names.

    Args:
        owner: the object.
        patch: with ``Scope.OBJECT``.
        replacement: called with what the object has there, returns what stands in.

    Raises:
        PatchError: the object has no such attribute.
    """
    assert patch.scope is Scope.OBJECT, patch
    kind, name = patch.locate(importlib.import_module(patch.module))
    assert isinstance(owner, kind), f"{patch.target} in a {type(owner).__name__}"
    if not hasattr(owner, name):
        raise patch.missing()
    setattr(owner, name, replacement(getattr(owner, name)))


def _standing(owner: Any, name: str) -> Any:
    """What stands there, a static method or class method as such."""
    return vars(owner).get(name, getattr(owner, name, None))


def _replacement(patch: Patch) -> Callable[[Any], Any]:
    assert patch.replacement is not None, f"{patch.name}: nothing to put in place"
    return patch.replacement


def _is_patched_module(name: str) -> bool:
    return name.startswith(_PATCHED_PACKAGE) and not any(
        name == own or name.startswith(own + ".") for own in _OWN_PACKAGES
    )


def _is_executing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _replace_each(patch: Patch, module: ModuleType) -> None:
    """Applies a patch of ``EVERY`` to a module; one of all attributes, to its classes too."""
    if patch.attribute != "*":
        _replace_one(patch, module, patch.attribute)
        return
    for name, value in list(vars(module).items()):
        _replace_one(patch, module, name)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for attribute in list(vars(value)):
                _replace_one(patch, value, attribute)


def _replace_one(patch: Patch, owner: Any, name: str) -> None:
    if name in vars(owner):
        value = vars(owner)[name]
        replacement = _replacement(patch)(value)
        if replacement is not value:
            setattr(owner, name, replacement)


class _PatchingFinder:
    """Finds ``megatron.*`` modules through the other finders and patches them once executed."""

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' spec, with a loader that patches; None when they have none."""
        if not _is_patched_module(name):
            return None
        self._patcher.knows(name)
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                self._wrap(spec)
                return spec
        return None

    def _wrap(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        @functools.wraps(execute)
        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            self._patcher.adapt(module)

        loader.exec_module = execute_and_patch


PROCESS = Patcher()
"""What is replaced in this process, for good."""
