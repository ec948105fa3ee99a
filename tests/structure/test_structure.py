"""Holds the code to its charter: import direction, sizes, names, the public face."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.structure import rules

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "megatron/core/models/mimo"
FOLDERS = ("megatron", "examples", "benchmarks", "tests", "scripts")
FILES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.is_file()
)

PUBLIC_NAMES = {
    "MimoModelConfig",
    "MimoModel",
    "MimoOptimizer",
    "get_mimo_optimizer",
    "ModalitySubmodules",
    "VisionModalitySubmodules",
    "AudioModalitySubmodules",
}

VAGUE = {
    *("utils", "helpers", "misc"),
    *("build", "chunks", "inputs", "parts", "start", "step", "streams", "unstacked"),
}
# The public import path of the partition adapter in megatron-core.
REQUIRED_PATHS = {"megatron/core/models/mimo/partition/utils.py"}


def complaints_about(rule: Callable[[str, str], list[str]], files: list[Path]) -> list[str]:
    assert files, "no files to check"
    return [
        complaint
        for path in files
        for complaint in rule(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


@pytest.mark.parametrize("rule", [rules.long_file, rules.long_functions, rules.large_classes])
def test_sizes(rule: Callable[[str, str], list[str]]) -> None:
    assert complaints_about(rule, FILES) == []


def test_no_test_file_selects_a_backend_on_import() -> None:
    assert complaints_about(rules.backend_on_import, sorted((ROOT / "tests").rglob("*.py"))) == []


def test_library_imports_one_way() -> None:
    def rule(source: str, where: str) -> list[str]:
        return rules.import_direction(source, where, where.removesuffix(".py").replace("/", "."))

    assert complaints_about(rule, sorted(LIBRARY.rglob("*.py"))) == []


def test_folders_of_the_model_import_one_way() -> None:
    def rule(source: str, where: str) -> list[str]:
        return rules.model_order(source, where, where.removesuffix(".py").replace("/", "."))

    assert complaints_about(rule, sorted((LIBRARY / "model").rglob("*.py"))) == []


def test_training_layer_imports_one_way() -> None:
    def rule(source: str, where: str) -> list[str]:
        return rules.layer_order(source, where, where.removesuffix(".py").replace("/", "."))

    files = sorted((ROOT / "megatron/mimo").rglob("*.py"))
    assert complaints_about(rule, files) == []
    assert complaints_about(rules.late_imports, files) == []


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_tree_of_a_page_has_every_folder_of_the_training_layer(page: str) -> None:
    tree = re.search(r"^megatron/mimo/ .*\n((?: .*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    assert tree is not None
    folders = [name for name in rules.ORDER if (ROOT / "megatron/mimo" / name).is_dir()]
    assert re.findall(r"^  (\w+)/ ", tree[1], re.MULTILINE) == folders


def test_library_names_no_device() -> None:
    assert complaints_about(rules.device_names, sorted(LIBRARY.rglob("*.py"))) == []


def test_files_are_named_for_their_job() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES}
    vague = {name for name in names if Path(name).stem in VAGUE}
    assert vague - REQUIRED_PATHS == set()


def test_public_names_of_the_library() -> None:
    listed = rules.public_names((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(PUBLIC_NAMES)


def test_packages_have_an_init_and_the_shared_namespace_has_none() -> None:
    shared = {ROOT / "megatron/core", ROOT / "megatron/core/models"}
    for folder in shared:
        assert not (folder / "__init__.py").exists(), f"{folder} belongs to megatron-core"
    packages = {path.parent for path in FILES if path.is_relative_to(ROOT / "megatron")}
    packages |= {path.parent for path in FILES if path.is_relative_to(ROOT / "tests")}
    assert {
        str(folder) for folder in packages - shared if not (folder / "__init__.py").exists()
    } == set()


def class_with(methods: int) -> str:
    return "class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(methods))


def function_with(lines: int, docstring: str = "") -> str:
    return f"def f():\n{docstring}" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (rules.long_file, "pass\n" * 401, "pass\n" * 400),
        (rules.long_functions, function_with(61), function_with(60, '    """A\n    b."""\n')),
        (rules.large_classes, class_with(13), class_with(12)),
        (rules.device_names, "f(device='cuda:0')", "'''cuda'''\nf(device=x.device)"),
        (rules.device_names, "new_group(backend='nccl')", "new_group()"),
        (rules.device_names, "torch.cuda.synchronize()", "x.to(device)"),
        (rules.device_names, "x = x.cuda()", "is_cuda = x.is_cuda"),
        (
            rules.late_imports,
            "def f():\n    from megatron.mimo.data import Sample",
            "def f():\n    # a reason\n    from megatron.mimo.data import Sample",
        ),
    ],
)
def test_size_and_device_rules_tell_bad_from_good(
    rule: Callable[[str, str], list[str]], bad: str, good: str
) -> None:
    assert len(rule(bad, "x.py")) == 1
    assert rule(good, "x.py") == []


@pytest.mark.parametrize(("where", "most"), rules.WIRING.items())
def test_files_that_wire_have_a_limit_of_their_own(where: str, most: int) -> None:
    assert ROOT.joinpath(where) in FILES
    assert len(rules.long_file("pass\n" * (most + 1), where)) == 1
    assert rules.long_file("pass\n" * most, where) == []


@pytest.mark.parametrize(
    ("part", "bad", "good"),
    [
        ("errors", "from .config import role", "import torch"),
        (
            "config.role",
            "from megatron.core.models.mimo import alignment",
            "from .stage import Stage",
        ),
        ("alignment", "import megatron.core.models.mimo.model.base", "from .config import role"),
        ("comm.bridge", "from ..submodules import base", "from ..alignment import plan"),
        ("alignment.cut", "from ..partition import utils", "from ..errors import MimoError"),
        ("optimizer", "from .model import MimoModel", "from .checkpoint import prefix"),
        ("model.base", "from megatron.mimo import data", "from ..alignment import merge"),
        ("model.base", "from megatron.core.models.mimo import MimoModel", "import megatron.core"),
        ("model.base", "if TYPE_CHECKING:\n import megatron.mimo", "import megatron.mimo_else"),
        ("config", "from .model import A", "if TYPE_CHECKING:\n from .model import A"),
        ("novel", "from .errors import MimoError", "import torch"),
    ],
)
def test_import_rule_tells_bad_from_good(part: str, bad: str, good: str) -> None:
    module = f"{rules.LIBRARY}.{part}"
    assert len(rules.import_direction(bad, "x.py", module)) == 1
    assert rules.import_direction(good, "x.py", module) == []


@pytest.mark.parametrize(
    ("module", "bad", "good"),
    [
        ("merging.merge", "from ..encoding.idle import f", "from ..batch.checks import f"),
        ("grids.roles", "from .. import MimoModel", "from ..encoding.idle import take_part"),
        ("language.run", "from ..base import MimoModel", "import torch"),
        ("language.run", "from ..row_source import f", "if TYPE_CHECKING:\n from ..base import A"),
        ("base", "from .encode_first import EncodeFirst", "from .grids.roles import role_of"),
        ("novel.file", "", "import torch"),
        ("__init__", "from .encode_first import EncodeFirst", "from .base import MimoModel"),
    ],
)
def test_rule_of_the_models_folders_tells_bad_from_good(module: str, bad: str, good: str) -> None:
    name = f"{rules.LIBRARY}.model.{module}"
    assert len(rules.model_order(bad, "x.py", name)) == 1
    assert len(rules.model_order(good, "x.py", name)) == (1 if module == "novel.file" else 0)


@pytest.mark.parametrize(
    ("module", "bad", "good"),
    [
        (
            "data.chat.text",
            "from megatron.mimo.models import f",
            "from megatron.mimo.data import f",
        ),
        ("data.chat.text", "if TYPE_CHECKING:\n import megatron.mimo.lora", "import megatron.core"),
        ("lora.peft", "def f():\n from megatron.mimo import training", "from . import adapter"),
        (
            "models.llava.model",
            "from megatron.mimo.models.llava_next.tiles import Size",
            "from megatron.mimo.models.common.keys import KeyEntry",
        ),
        (
            "models.common.keys",
            "from megatron.mimo.models.llava import model",
            "from megatron.mimo.data import Sample",
        ),
        (
            "recipes.llava",
            "from megatron.mimo.recipes.tiny.tasks import digit_image",
            "from megatron.mimo.recipes.published import vicuna",
        ),
        (
            "data.media.videos",
            "from megatron.mimo.data.chat.text import ChatText",
            "from megatron.mimo.data.sample import Sample",
        ),
        (
            "data.sample",
            "from megatron.mimo.data.media.files import Video",
            "from megatron.mimo.backend import f",
        ),
        ("novel.file", "import torch", "import torch"),
        ("data.novel", "import torch", "import torch"),
    ],
)
def test_order_rule_tells_bad_from_good(module: str, bad: str, good: str) -> None:
    name = f"{rules.TRAINING_LAYER}.{module}"
    assert len(rules.layer_order(bad, "x.py", name)) == 1
    assert len(rules.layer_order(good, "x.py", name)) == ("novel" in module)


def test_the_reception_may_import_every_part() -> None:
    module = f"{rules.LIBRARY}.__init__"
    assert rules.import_direction("from .model import MimoModel", "x.py", module) == []
