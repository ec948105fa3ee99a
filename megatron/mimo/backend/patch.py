"""What is replaced in other packages, as data: a :class:`Patch` names one attribute and says why.

A target reads ``module:attribute.path``. Its module is an importable one, or one of two of a kind:

- ``VIEW``: the ``torch`` that ``megatron.*`` modules see (:mod:`megatron.mimo.backend.torch_view`);
- ``EVERY``: each of megatron-core's modules that has the attribute; ``*`` is each attribute of a
  module and of the classes that it defines.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement

__all__ = ["EVERY", "MADE_FOR", "VIEW", "Patch", "PatchError", "Scope"]

VIEW = "torch-seen-by-megatron"
EVERY = "megatron.*"

MADE_FOR = {
    "megatron": "megatron-core>=0.19,<0.20",
    "torch": "torch>=2.11",
    VIEW: "torch>=2.11",
    "PIL": "pillow",
    "argparse": "python>=3.12",
    "sys": "python>=3.12",
    "os": "python>=3.12",
}
"""The top package of a target -> the versions of its distribution that patches are made for."""


class PatchError(RuntimeError):
    """A name that has to be replaced is not there."""


class Scope(Enum):
    """When a patch is in place, and what takes it off."""

    CPU = ("in a process that has chosen the CPU", "never; the process stays on the CPU")
    PROCESS = ("in every process, on CPU and on GPU", "never; it holds to the end of the process")
    RUN = ("while a run trains", "when the run's training ends")
    CALL = ("for the time of one call", "when the call ends")
    OBJECT = ("in one object", "never; it goes with the object")

    def __init__(self, when: str, undone: str) -> None:
        self.when = when
        self.undone = undone


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced attribute.

    Attributes:
        name: unique, for error messages and tests.
        target: ``module:attribute.path``; with ``Scope.OBJECT``, the class and the attribute.
        reason: what goes wrong without it, or what it is for.
        scope: when it is in place, and what takes it off.
        replacement: called with the original (None where there is none), returns what stands in;
            None where whoever puts the patch in place brings what stands in.
    """

    name: str
    target: str
    reason: str
    scope: Scope = Scope.CPU
    replacement: Callable[[Any], Any] | None = None

    @property
    def module(self) -> str:
        """The module part of ``target``."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """The attribute path inside ``module``."""
        return self.target.partition(":")[2]

    @property
    def made_for(self) -> str:
        """The distribution that has the target, and its versions, as a requirement."""
        return MADE_FOR[self.module.partition(".")[0]]

    def locate(self, module: ModuleType) -> tuple[Any, str]:
        """The object in ``module`` whose attribute is replaced, and the attribute's name.

        With ``Scope.OBJECT``, the class of which the object is.

        Raises:
            PatchError: there is none, or it has no such attribute.
        """
        owner: Any = module
        *path, name = self.attribute.split(".")
        for step in path:
            owner = getattr(owner, step, None)
        if owner is None or (self._is_checked and not hasattr(owner, name)):
            raise self.missing()
        return owner, name

    @property
    def _is_checked(self) -> bool:
        """Whether the attribute has to be there: an object's may, torch's copy gets new ones."""
        return self.scope is not Scope.OBJECT and self.module != VIEW

    def missing(self) -> PatchError:
        """The error that says what is not there, and which version would have it."""
        required = Requirement(self.made_for)
        return PatchError(
            f"{self.target} is not there to be replaced ({self.name}); expected "
            f"{self.made_for}, got {required.name} {_installed(required.name)}; install a "
            "version of this range"
        )

    def fits(self) -> bool:
        """Whether the installed version is one of those that the patch is made for."""
        required = Requirement(self.made_for)
        return required.specifier.contains(_installed(required.name), prereleases=True)


def _installed(distribution: str) -> str:
    if distribution == "python":
        return platform.python_version()
    if distribution == "megatron-core":  # of a checkout on the path, pip knows nothing
        version = getattr(sys.modules.get("megatron.core"), "__version__", None)
        if version is not None:
            return str(version)
    return importlib.metadata.version(distribution)
