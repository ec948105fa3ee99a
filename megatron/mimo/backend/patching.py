"""Patches of megatron-core as data, applied to modules now and to those imported later.

A :class:`Patch` names one attribute and says what takes its place and why. A target reads
``module:attribute.path``; the module is either an importable ``megatron.*`` module, patched when it
is imported (or at once, if it already is), any other importable module, patched at once, or
``VIEW``: the ``torch`` that ``megatron.*`` modules see (:mod:`megatron.mimo.backend.torch_view`).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

VIEW = "torch-seen-by-megatron"
_PATCHED_PACKAGE = "megatron."
_OWN_PACKAGES = ("megatron.mimo",)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced attribute.

    Attributes:
        name: unique, for error messages and tests.
        target: ``module:attribute.path``.
        reason: what goes wrong without it.
        replacement: called with the original (None where there is none), returns what stands in.
        needs_no_cuda: True when the patch only makes sense without CUDA; False for defects of
            megatron-core 0.19 from PyPI that every backend meets.
    """

    name: str
    target: str
    reason: str
    replacement: Callable[[Any], Any]
    needs_no_cuda: bool = True

    @property
    def module(self) -> str:
        """The module part of ``target``."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """The attribute path inside ``module``."""
        return self.target.partition(":")[2]


class Patcher:
    """Applies patches to loaded modules and, by a meta-path finder, to those imported later.

    ``originals`` maps the target of every patch that has taken effect to what stood there before.
    """

    def __init__(self) -> None:
        self.patches: list[Patch] = []
        self.originals: dict[str, Any] = {}
        self.view: ModuleType | None = None
        self._finder = _PatchingFinder(self)

    def apply(self, patches: Iterable[Patch], view: ModuleType | None = None) -> None:
        """Adds ``patches``, and ``view`` as the ``torch`` of every ``megatron.*`` module."""
        new = [patch for patch in patches if patch not in self.patches]
        self.patches += new
        self.view = view or self.view
        if self._finder not in sys.meta_path:
            sys.meta_path.insert(0, self._finder)
        for patch in new:
            if patch.module != VIEW and not _is_patched_module(patch.module):
                self._install(patch, importlib.import_module(patch.module))
            elif patch.module == VIEW and self.view is not None:
                self._install(patch, self.view)
        for module in list(_loaded_modules()):
            self.adapt(module)

    def adapt(self, module: ModuleType) -> None:
        """Applies what concerns ``module``, which has been executed."""
        if self.view is not None:
            _use_view(module, self.view)
        for patch in self.patches:
            if patch.module == module.__name__ and patch.target not in self.originals:
                self._install(patch, module)

    def _install(self, patch: Patch, module: ModuleType) -> None:
        owner: Any = module
        *path, name = patch.attribute.split(".")
        for step in path:
            owner = getattr(owner, step)
        original = owner.__dict__.get(name, getattr(owner, name, None))
        replacement = patch.replacement(original)
        self.originals[patch.target] = original
        setattr(owner, name, replacement)
        if isinstance(original, FunctionType):
            _rebind(original, replacement)


def _is_patched_module(name: str) -> bool:
    return name.startswith(_PATCHED_PACKAGE) and not any(
        name == own or name.startswith(own + ".") for own in _OWN_PACKAGES
    )


def _loaded_modules() -> Iterator[ModuleType]:
    """The ``megatron.*`` modules whose execution has finished."""
    modules: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in modules:
        initializing = getattr(getattr(module, "__spec__", None), "_initializing", False)
        if _is_patched_module(name) and isinstance(module, ModuleType) and not initializing:
            yield module


def _rebind(original: object, replacement: object) -> None:
    """Modules that imported ``original`` by name get ``replacement`` too."""
    for module in _loaded_modules():
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, replacement)


def _use_view(module: ModuleType, view: ModuleType) -> None:
    """Makes ``view`` the ``torch`` of ``module`` and undoes ``torch.compile`` at its top level."""
    import torch

    for name, value in list(vars(module).items()):
        if value is torch:
            setattr(module, name, view)
        elif isinstance(value, FunctionType):
            setattr(module, name, _uncompiled(value))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, member in list(vars(value).items()):
                if isinstance(member, FunctionType) and _uncompiled(member) is not member:
                    setattr(value, attribute, _uncompiled(member))


def _uncompiled(function: FunctionType) -> FunctionType:
    original: FunctionType = getattr(function, "_torchdynamo_orig_callable", function)
    return original


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
