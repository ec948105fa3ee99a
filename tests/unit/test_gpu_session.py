"""Tests that need a GPU run in a second pytest that sees it; the first one sees none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# A machine whose driver is there; torch sees a device wherever CUDA_VISIBLE_DEVICES names one.
CONFTEST = """
    import os
    import tests.gpu_session
    from tests.conftest import *

    tests.gpu_session.has_driver = lambda: True
    tests.gpu_session.has_gpu = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") == "7"
"""
TESTS = """
    import os
    import pytest

    def test_on_the_cpu_first():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

    @pytest.mark.gpu
    @pytest.mark.parametrize("number", [1, 2])
    def test_on_the_gpu(number, tmp_path):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        print("in process", os.getpid())

    @pytest.mark.gpu
    def test_that_fails():
        print("what it printed")
        assert 1 + 1 == 3, "not three"

    @pytest.mark.gpu
    def test_that_dies():
        os.write(2, b"an illegal memory access")
        os._exit(9)

    @pytest.mark.te
    def test_after_it():
        pass

    def test_on_the_cpu_last():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
"""


@pytest.mark.wide
@pytest.mark.slow
def test_gpu_tests_see_the_gpu_and_the_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in {"conftest": CONFTEST, "test_all": TESTS}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    command = [sys.executable, "-m", "pytest", "-vra", f"--rootdir={tmp_path}", "."]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    said = ended.stdout + ended.stderr
    outcomes = [line.split()[:2] for line in said.splitlines() if line.startswith("test_all.py::")]
    *outcomes, last = outcomes
    assert outcomes == [
        ["test_all.py::test_on_the_cpu_first", "PASSED"],
        ["test_all.py::test_on_the_cpu_last", "PASSED"],
        ["test_all.py::test_on_the_gpu[1]", "PASSED"],
        ["test_all.py::test_on_the_gpu[2]", "PASSED"],
        ["test_all.py::test_that_fails", "FAILED"],
        ["test_all.py::test_that_dies", "FAILED"],
    ], said
    assert last[0] == "test_all.py::test_after_it"
    assert last[1] in ("PASSED", "SKIPPED")  # with Transformer Engine, and without it
    assert "AssertionError: not three" in said
    assert "what it printed" in said
    assert "the GPU session ended (code 9) during this test" in said
    assert "an illegal memory access" in said
