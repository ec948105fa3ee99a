"""A program: one run, and what stands in megatron-core's modules after it that did not before.

Its last line is a list in JSON: names of attributes that are others now, or stand-ins of a run.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

OF_RUNS = ("megatron.mimo.training", "megatron.mimo.process", "megatron.mimo.arguments")


def standing() -> dict[str, Any]:
    """Functions, classes and methods by name, in all loaded modules of megatron-core."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith(("megatron.core.", "megatron.training.")):
            continue
        for attribute, value in list(vars(module).items()):
            if callable(value):
                found[f"{name}:{attribute}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}:{attribute}.{key}": part for key, part in _methods(value)}
    return found


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(kind).items()):
        if isinstance(value, FunctionType | staticmethod | classmethod | property):
            yield name, value


def main() -> int:
    # As a run does it: the process is prepared before Megatron is imported.
    from megatron.mimo.backend import select_backend
    from megatron.mimo.backend.registry import REGISTRY
    from megatron.mimo.layers import install_adam
    from megatron.mimo.training import main as train

    select_backend()
    install_adam()
    for patch in REGISTRY:
        if patch.module.startswith(("megatron.core", "megatron.training")):
            importlib.import_module(patch.module)
    before, words = standing(), list(sys.argv)
    code = train()
    after = standing()
    changed = [name for name, value in before.items() if after.get(name) is not value]
    left = [name for name, value in after.items() if _module(value).startswith(OF_RUNS)]
    if sys.argv != words:
        changed.append("sys:argv")
    sys.stdout.write(f"{json.dumps([len(before), sorted({*changed, *left})])}\n")
    return code


def _module(value: Any) -> str:
    return str(getattr(getattr(value, "__func__", value), "__module__", ""))


if __name__ == "__main__":
    sys.exit(main())
