"""What the launcher says before it starts a process; how its jobs end is in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.mimo.process import launch


def test_a_script_that_is_not_there_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "pretrain.py"
    assert launch.main(["--nproc-per-node", "2", str(script), "--recipe", "digits"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"error: there is no script {script}; correct the path (-m takes a module by its name)"
    ]
