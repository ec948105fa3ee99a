"""The rule that whatever is replaced in another package is in the registry, as far as syntax shows.

It complains where code outside of the registry

- assigns to, or deletes, an attribute of a name that is imported from another package;
- calls ``setattr`` or ``delattr`` on anything but ``self``, writes into ``vars`` or ``__dict__``;
- gives an object other than ``self`` a function: a lambda, a ``partial``, one of the file;
- assigns to ``__class__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

OWN = ("megatron.mimo", "megatron.core.models.mimo")
REGISTRY = ("megatron/mimo/backend/patching.py",)


def replaced_elsewhere(source: str, where: str) -> list[str]:
    """Complains about what is replaced without a row of the registry."""
    if where in REGISTRY:
        return []
    tree = ast.parse(source)
    foreign, functions = set(_foreign_names(tree)), set(_functions(tree))
    complaints = []
    for node in ast.walk(tree):
        what = _assigned(node, foreign, functions) or _called(node)
        if what is not None:
            complaints.append(
                f"{where}:{node.lineno}: {what}; give it a patch in megatron.mimo.backend.hooks, "
                "and put that in place with replaced or replace_in"
            )
    return complaints


def _assigned(node: ast.AST, foreign: set[str], functions: set[str]) -> str | None:
    value: ast.expr | None = None
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets, value = [node.target], node.value
    elif isinstance(node, ast.Delete):
        targets = node.targets
    else:
        return None
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
            text = ast.unparse(part)
            if isinstance(part, ast.Subscript) and _is_namespace(part.value):
                return f"writes into {ast.unparse(part.value)}"
            if not isinstance(part, ast.Attribute):
                continue
            owner = text.partition(".")[0]
            if owner in foreign:
                return f"assigns to {text}, of another package"
            if part.attr == "__class__":
                return f"assigns to {text}"
            if owner != "self" and value is not None and _is_function(value, functions):
                return f"assigns a function to {text}"
    return None


def _called(node: ast.AST) -> str | None:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return None
    if node.func.id not in ("setattr", "delattr") or not node.args:
        return None
    owner = ast.unparse(node.args[0])
    return None if owner == "self" else f"calls {node.func.id} on {owner}"


def _is_namespace(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "__dict__" and ast.unparse(node.value) != "self"
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("vars", "globals")


def _is_function(value: ast.expr, functions: set[str]) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] == "partial"
    return isinstance(value, ast.Lambda) or ast.unparse(value) in functions


def _functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


def _foreign_names(tree: ast.Module) -> Iterator[str]:
    """Names under which a file knows modules and classes of other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not _is_own(alias.name):
                    yield alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if not _is_own(f"{node.module}.{alias.name}"):
                    yield alias.asname or alias.name


def _is_own(name: str) -> bool:
    return any(name == own or name.startswith(f"{own}.") for own in OWN)
