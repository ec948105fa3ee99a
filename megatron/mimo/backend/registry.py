"""The registry: everything that this project replaces in other packages, and how it reads."""

from __future__ import annotations

from megatron.mimo.backend.hooks import ADAM, HOOKS
from megatron.mimo.backend.patch import Patch, Scope
from megatron.mimo.backend.table import PATCHES

__all__ = ["REGISTRY", "describe"]

REGISTRY: tuple[Patch, ...] = (*PATCHES, *ADAM, *HOOKS)
"""Every patch there is."""


def describe() -> str:
    """The registry as Markdown: for each scope a table of what is replaced, where and why."""
    sections = []
    for scope in Scope:
        patches = [patch for patch in REGISTRY if patch.scope is scope]
        sections.append(
            f"## {scope.when[0].upper()}{scope.when[1:]}\n\n"
            f"Undone: {scope.undone}.\n\n"
            "| replaced | where | made for | why |\n|---|---|---|---|\n"
            + "".join(_row(patch) for patch in patches)
        )
    return "\n".join(sections)


def _row(patch: Patch) -> str:
    return f"| {patch.name} | `{patch.target}` | {patch.made_for} | {patch.reason} |\n"
