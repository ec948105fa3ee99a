"""The namespace and the finder alone, in processes that have no other package at all."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.overlay.environment import ROOT
from tests.time_limits import HANG


def run_bare(code: str, *path: Path | str, switch: str | None = None) -> str:
    """Runs code in a Python without site-packages whose ``sys.path`` starts with ``path``."""
    entries = [str(entry) for entry in path]
    environment = {} if switch is None else {"MEGATRON_MIMO_OVERLAY": switch}
    result = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {entries!r}\n{code}"],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    return (result.stdout if result.returncode == 0 else result.stderr).strip()


def make_portion(folder: Path, name: str) -> Path:
    """Makes a folder for ``sys.path`` with one more part of the namespace, ``megatron.<name>``."""
    (folder / "megatron").mkdir(parents=True)
    (folder / "megatron" / f"{name}.py").write_text(f"where = {str(folder)!r}\n", encoding="utf-8")
    return folder


def make_core(folder: Path, mimo: str = "") -> Path:
    """Makes a tree with a bare ``megatron.core.models.mimo`` of its own."""
    for package in ("core", "core/models", "core/models/mimo"):
        (folder / "megatron" / package).mkdir(parents=True)
        (folder / "megatron" / package / "__init__.py").write_text(mimo, encoding="utf-8")
    return folder


def test_portions_keep_the_order_of_the_path(tmp_path: Path) -> None:
    first = make_portion(tmp_path / "first", "shared")
    last = make_portion(tmp_path / "last", "shared")
    code = "import megatron, megatron.shared as m; print(megatron.__file__, m.where)"
    ours = str(ROOT / "megatron/__init__.py")
    assert run_bare(code, first, ROOT, last) == f"{ours} {first}"
    assert run_bare(code, last, ROOT, first) == f"{ours} {last}"


def test_a_portion_that_appears_later_is_found(tmp_path: Path) -> None:
    later = make_portion(tmp_path, "later")
    code = f"""
import megatron
try:
    import megatron.later
except ModuleNotFoundError:
    sys.path.append({str(later)!r})
    import megatron.later
print(megatron.later.where, len(megatron.__path__), megatron.__path__[-1])
"""
    assert run_bare(code, ROOT) == f"{later} 2 {later}/megatron"


def test_a_portion_in_a_zip_file_is_found(tmp_path: Path) -> None:
    make_portion(tmp_path / "tree", "zipped")
    archive = tmp_path / "part.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.mkdir("megatron")  # without its folder's entry, a file is invisible to zipimport
        file.write(tmp_path / "tree/megatron/zipped.py", "megatron/zipped.py")
    code = "import megatron.zipped as m; print(m.__file__)"
    assert run_bare(code, ROOT, archive) == f"{archive}/megatron/zipped.py"


def test_own_portion_outlives_its_path_entry() -> None:
    code = "import megatron; del sys.path[0]; import megatron.mimo as m; print(m.__file__)"
    assert run_bare(code, ROOT) == str(ROOT / "megatron/mimo/__init__.py")


def test_tools_that_list_modules_see_all_portions(tmp_path: Path) -> None:
    portion = make_portion(tmp_path, "extra")
    code = """
import megatron, pkgutil
print(*sorted(m.name for m in pkgutil.iter_modules(megatron.__path__)))
"""
    assert run_bare(code, ROOT, portion) == "extra mimo"


def test_reloading_leaves_one_finder() -> None:
    code = """
import importlib, megatron
for _ in range(3): importlib.reload(megatron)
print([getattr(f, "owner", None) for f in sys.meta_path].count("megatron-mimo"))
"""
    assert run_bare(code, ROOT) == "1"


def test_importing_megatron_loads_next_to_nothing() -> None:
    code = """
import collections.abc, importlib.machinery, os
before = set(sys.modules)
import megatron
print(*sorted(set(sys.modules) - before))
"""
    assert run_bare(code, ROOT) == "megatron"


@pytest.mark.parametrize(
    ("switch", "is_ours"), [(None, True), ("", True), ("1", True), ("0", False)]
)
def test_the_switch(tmp_path: Path, switch: str | None, is_ours: bool) -> None:
    tree = make_core(tmp_path)
    code = "import importlib.util as u; print(u.find_spec('megatron.core.models.mimo').origin)"
    origin = run_bare(code, tree, ROOT, switch=switch)
    expected = ROOT if is_ours else tree
    assert origin == str(expected / "megatron/core/models/mimo/__init__.py")


def test_the_switch_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    error = run_bare("import megatron.core.models.mimo", make_core(tmp_path), ROOT, switch="off")
    assert "ValueError: MEGATRON_MIMO_OVERLAY='off' is not understood; set 0" in error


def test_without_megatron_core_the_error_says_so() -> None:
    error = run_bare("import megatron.core.models.mimo", ROOT)
    assert "needs megatron-core, which is not installed" in error
    assert "pip install 'megatron-core>=0.19,<0.20'" in error


def test_only_the_one_name_is_answered_for(tmp_path: Path) -> None:
    code = """
import megatron, megatron.core.models
finder = sys.meta_path[0]
names = ["megatron", "megatron.core", "megatron.core.models", "megatron.core.models.mimo.model",
         "megatron.core.models.mimosa", "mimo", "torch", "megatron.core.models.mimo"]
print(*[name for name in names if finder.find_spec(name, None, None)])
"""
    assert run_bare(code, make_core(tmp_path), ROOT) == "megatron.core.models.mimo"
