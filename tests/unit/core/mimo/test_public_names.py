"""Every public name of megatron-core's MIMO is here, and takes what it takes there."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from inspect import Parameter
from types import FunctionType
from typing import Any

from tests.rank_pool import RankPool
from tests.unit.core.mimo.test_stock import LIBRARY, library

# Module -> what scripts import from it.
PUBLIC = {
    "": (
        "AudioModalitySubmodules",
        "MimoModel",
        "MimoModelConfig",
        "MimoOptimizer",
        "ModalitySubmodules",
        "VisionModalitySubmodules",
        "get_mimo_optimizer",
    ),
    ".config": ("MimoModelConfig", "ModuleStageInfo", "RankRole"),
    ".config.base_configs": ("MimoModelConfig",),
    ".config.role": ("MIMO_LANGUAGE_MODULE_KEY", "ModuleLayout", "ModuleStageInfo", "RankRole"),
    ".model": ("MimoModel",),
    ".model.base": ("MimoModel",),
    ".submodules.base": ("ModalitySubmodules",),
    ".submodules.vision": ("VisionModalitySubmodules",),
    ".submodules.audio": ("AudioModalitySubmodules",),
    ".optimizer": ("MimoOptimizer", "ModuleOptimizerInfo", "get_mimo_optimizer"),
    ".partition.utils": ("PartitionAdapter", "PartitionConfig"),
    ".comm.colocated_communicator": (
        "BridgeDirection",
        "ColocatedBridgeCommunicator",
        "SliceInfo",
    ),
}
_UNDERSCORED = ("_forward_encoders", "_forward_language_module")  # that scripts override


def test_names_and_arguments(ranks: RankPool) -> None:
    (found,) = ranks(1)(compare)
    assert found == []


def compare() -> list[str]:
    """What is there and not here, or takes less."""
    with library(stock=True):
        theirs = {name: _face(public) for name, public in _public()}
    with library(stock=False):
        ours = {name: _found(name) for name in theirs}
    return [
        f"{name}: {face} there, {ours[name]} here"
        for name, face in theirs.items()
        if not _includes(ours[name], face)
    ]


def _public() -> Iterator[tuple[tuple[str, ...], Any]]:
    """What stock has: names of modules' contents, and of what it gives its classes."""
    for module, names in PUBLIC.items():
        for name in names:
            public = getattr(importlib.import_module(LIBRARY + module), name)
            yield (module, name), public
            bases = public.__mro__ if inspect.isclass(public) else ()
            for base in bases:
                own = vars(base) if base.__module__.startswith(LIBRARY) else {}
                for member, value in own.items():
                    shown = not member.startswith("_") or member in _UNDERSCORED
                    if shown and isinstance(value, property | FunctionType | classmethod):
                        yield (module, name, member), inspect.getattr_static(public, member)


def _found(name: tuple[str, ...]) -> Any:
    """What is here under a name; None where nothing is."""
    module, *path = name
    found: Any = importlib.import_module(LIBRARY + module)
    for part in path:
        found = inspect.getattr_static(found, part, None)
    return _face(found)


def _face(public: Any) -> Any:
    """What calls take, or what a constant and an enumeration say."""
    if inspect.isclass(public) and issubclass(public, enum.Enum):
        return {one.name: one.value for one in public}
    if isinstance(public, property):
        return "property"
    if inspect.isclass(public) and is_dataclass(public):
        return [Parameter(one.name, Parameter.POSITIONAL_OR_KEYWORD) for one in fields(public)]
    if isinstance(public, classmethod):
        public = public.__func__
    if callable(public):
        return [*inspect.signature(public).parameters.values()]
    return public


def _includes(ours: Any, theirs: Any) -> bool:
    """Whether ours takes every call that theirs does."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return bool(ours == theirs)
    many = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    kinds = {one.kind for one in ours}
    names = [one.name for one in ours]
    for number, one in enumerate(theirs):
        if one.kind in many:
            if one.kind not in kinds:
                return False
        elif one.kind is Parameter.KEYWORD_ONLY:
            if one.name not in names:
                return False
        elif names[number : number + 1] != [one.name] or (
            _plain(one.default) and ours[number].default != one.default
        ):
            return False
    return True


def _plain(default: Any) -> bool:
    return default is None or isinstance(default, bool | int | str)
