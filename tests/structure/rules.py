"""The rules of the code's structure, as functions from source text to a list of complaints.

A complaint says where, what was found, and what to do. The functions read syntax trees and import
nothing, so that the rules can be tested on a few lines of text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

MAX_FILE_LINES = 400
# Files that only wire: what they grow by belongs in a file that is named for it.
WIRING = {"megatron/core/models/mimo/model/base.py": 250}
MAX_FUNCTION_LINES = 60
MAX_METHODS = 12

LIBRARY = "megatron.core.models.mimo"
TRAINING_LAYER = "megatron.mimo"

# The library's parts from low to high: each may import those before it. A part that is not listed
# may import none. Optimizers take modules as arguments.
_ORDER = (
    *("errors", "signatures", "ranges"),
    *("config", "alignment", "partition", "comm", "submodules", "model"),
)
IMPORTS_OF_PART: dict[str, frozenset[str]] = {
    **{part: frozenset(_ORDER[:place]) for place, part in enumerate(_ORDER)},
    "checkpoint": frozenset({"errors", "config"}),
    "optimizer": frozenset({"errors", "config", "checkpoint"}),
}
# Folders of the library's model, from low to high: each imports those before it. The files that are
# in none of them are the model itself.
THE_MODEL = "the model itself"
MODEL_FOLDERS = ("batch", "merging", "encoding", "language", "grids", THE_MODEL, "encode_first")

# Folders of the training layer, from low to high: each imports only those before it.
ORDER = (
    *("backend", "process", "layers", "encoders", "data", "models", "checkpoints", "lora"),
    *("recipes", "topology", "arguments", "inference", "training", "convert", "inspection"),
    *("planner", "plan"),  # a command, and what stands behind it
)
# Within data: first what all of it speaks in, then its folders.
ORDER_OF_DATA = (
    *("sample", "conversation", "positions", "measure", "media_format", "bad_samples"),
    *("media", "formats", "sources", "chat", "reading"),
    *("micro_batches", "row_cache", "global_batches", "digits"),
)
# Within models, what families have in common knows none of them, and they do not know each other.
COMMON = "common"
TINY = f"{TRAINING_LAYER}.recipes.tiny"

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_file(source: str, where: str) -> list[str]:
    lines, most = source.count("\n"), WIRING.get(where, MAX_FILE_LINES)
    if lines <= most:
        return []
    return [f"{where}: {lines} lines, at most {most}; split it by job"]


def long_functions(source: str, where: str) -> list[str]:
    """Complains about functions longer than a screen; the docstring, a contract, is not counted."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _Function):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        docstring = _docstring(node)
        if docstring is not None and docstring.end_lineno is not None:
            lines -= docstring.end_lineno - docstring.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            complaints.append(
                f"{where}: function {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}; "
                "take a step out of it"
            )
    return complaints


def large_classes(source: str, where: str) -> list[str]:
    """Complains about classes with too many methods; the setter of a property counts with it."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = {child.name for child in node.body if isinstance(child, _Function)}
            if len(methods) > MAX_METHODS:
                complaints.append(
                    f"{where}: class {node.name} has {len(methods)} methods, at most "
                    f"{MAX_METHODS}; give a job to a class of its own or to free functions"
                )
    return complaints


def device_names(source: str, where: str) -> list[str]:
    """Complains about a device or a communication backend that is named instead of passed in."""
    tree = ast.parse(source)
    docstrings = {id(docstring) for node in ast.walk(tree) if (docstring := _docstring(node))}
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"(cuda|nccl)(:.*)?", node.value) and id(node) not in docstrings
        else:
            named = isinstance(node, ast.Attribute) and node.attr == "cuda"
        if named:
            complaints.append(
                f"{where}:{node.lineno}: names cuda or nccl; take the device or group from the "
                "tensor or the collection at hand"
            )
    return complaints


def import_direction(source: str, where: str, module: str) -> list[str]:
    """Complains about imports of a module of the library that go against the one direction.

    Imports for type checkers only (under ``if TYPE_CHECKING``) may go across parts, but never to
    the training layer.

    Args:
        source: the module's text.
        where: its path, for the complaint.
        module: its full name; for a package's ``__init__.py``, with ``.__init__``.
    """
    part = module.removeprefix(f"{LIBRARY}.").split(".")[0]
    complaints = []
    for line, target, is_for_types in _imports(ast.parse(source), module):
        if _is_within(target, TRAINING_LAYER):
            complaints.append(f"{where}:{line}: the library imports {target}, the training layer")
        if not _is_within(target, LIBRARY) or is_for_types or part == "__init__":
            continue
        if part not in IMPORTS_OF_PART:
            return [
                *complaints,
                f"{where}: {part} is a new part; list what it may import in {__name__}",
            ]
        imported = target.removeprefix(LIBRARY).removeprefix(".").split(".")[0]
        if imported != part and imported not in IMPORTS_OF_PART[part]:
            allowed = ", ".join(sorted(IMPORTS_OF_PART[part])) or "nothing"
            complaints.append(
                f"{where}:{line}: {part} imports {target}; of the library it may import {allowed}"
            )
    return complaints


def model_order(source: str, where: str, module: str) -> list[str]:
    """Complains about imports within the library's model that go up in ``MODEL_FOLDERS``.

    Imports for type checkers only may. Arguments are those of ``import_direction``.
    """
    first, *inner = module.removeprefix(f"{LIBRARY}.model.").split(".")
    own = first if inner else THE_MODEL
    if own not in MODEL_FOLDERS:
        return [f"{where}: {own} is no folder of {MODEL_FOLDERS}; list it in {__name__}"]
    return [
        f"{where}:{line}: {own} imports {target}, which is above it"
        for line, target, is_for_types in _imports(ast.parse(source), module)
        if not is_for_types and _goes_up(own, _model_folder(target), MODEL_FOLDERS)
    ]


def _model_folder(target: str) -> str:
    """The folder of what is imported, where that is of the library's model; else ""."""
    if not _is_within(target, f"{LIBRARY}.model"):
        return ""
    first = target.removeprefix(f"{LIBRARY}.model").removeprefix(".").split(".")[0]
    return first if first in MODEL_FOLDERS else THE_MODEL


def layer_order(source: str, where: str, module: str) -> list[str]:
    """Complains about imports of the training layer that go up in ``ORDER``, in functions too.

    Within data they go down in ``ORDER_OF_DATA``, within models no family imports another.

    Args:
        source: the module's text.
        where: its path, for the complaint.
        module: its full name; for a package's ``__init__.py``, with ``.__init__``.
    """
    own = module.removeprefix(f"{TRAINING_LAYER}.").split(".")
    if own[0] not in ORDER:
        return [] if own == ["__init__"] else [f"{where}: {own[0]} is no folder of {ORDER}"]
    is_of_data = own[0] == "data" and own[1] not in ("__init__", "__main__")
    if is_of_data and own[1] not in ORDER_OF_DATA:
        return [f"{where}: {own[1]} is none of data's {ORDER_OF_DATA}"]
    complaints = []
    for line, target, _ in _imports(ast.parse(source), module):
        if not _is_within(target, TRAINING_LAYER):
            continue
        other = target.removeprefix(f"{TRAINING_LAYER}.").split(".")
        within_data = is_of_data and other[0] == "data" and len(other) > 1
        if _goes_up(own[0], other[0], ORDER):
            complaints.append(f"{where}:{line}: {own[0]} imports {target}, which is above it")
        if within_data and _goes_up(own[1], other[1], ORDER_OF_DATA):
            complaints.append(f"{where}:{line}: {own[1]} imports {target}, which is above it")
        if _is_within(target, TINY) and not _is_within(module, TINY):
            complaints.append(f"{where}:{line}: imports {target}, which only tiny twins use")
        of_a_family = own[0] == other[0] == "models" and len(own) > 2 and len(other) > 2
        if of_a_family and other[1] not in (own[1], COMMON):
            complaints.append(f"{where}:{line}: {own[1]} imports {target}, another family's")
    return complaints


def _goes_up(own: str, other: str, order: Sequence[str]) -> bool:
    return other in order and order.index(other) > order.index(own)


def late_imports(source: str, where: str) -> list[str]:
    """Complains about imports of the training layer in a function that give no reason.

    The reason is a comment on the line or on the one above, which may be another import's.
    """
    tree, lines = ast.parse(source), source.splitlines()
    at_top = {id(node) for node in tree.body}
    complaints, excused = [], -1
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno):
        if id(node) in at_top:
            continue
        if not _is_within(node.module or "", TRAINING_LAYER) or _for_types(tree, node):
            continue
        above = lines[node.lineno - 2].strip()
        is_excused = "#" in lines[node.lineno - 1] or above.startswith("#")
        if is_excused or excused == node.lineno - 1:
            excused = node.end_lineno or node.lineno
            continue
        complaints.append(
            f"{where}:{node.lineno}: imports {node.module} late; import it at the top, or say why "
            "not in a comment above"
        )
    return complaints


def _for_types(tree: ast.Module, node: ast.AST) -> bool:
    return any(
        child is node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for child in ast.walk(block)
    )


def public_names(source: str) -> list[str]:
    """Returns what ``__all__`` of a module lists; empty when it has none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _docstring(node: ast.AST) -> ast.Constant | None:
    holds_docstring = isinstance(node, (*_Function.__args__, ast.ClassDef, ast.Module))
    if holds_docstring and ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        assert isinstance(first, ast.Expr)
        assert isinstance(first.value, ast.Constant)
        return first.value
    return None


def _imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, full name of the module or of a name in it, only for type checkers)."""
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", id(node) in for_types


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def backend_on_import(source: str, where: str) -> list[str]:
    """Complains about a test file that selects the CPU as it is imported.

    A GPU's tests are collected by a process that imports all files.
    """
    return [
        f"{where}: select_backend() at import; call it in a fixture or a test"
        for node in ast.parse(source).body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "select_backend"
    ]
