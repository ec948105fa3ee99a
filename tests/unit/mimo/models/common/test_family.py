"""The model of transformers that a family is compared with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron.mimo.models.common.family import without_kernels


def test_kernels_are_hidden_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fla.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    for _ in range(2):  # not yet imported, then imported
        with without_kernels(), pytest.raises(ImportError):
            importlib.import_module("fla")
        stand_in = importlib.import_module("fla")
        assert stand_in.__file__ == str(tmp_path / "fla.py")
        assert sys.modules["fla"] is stand_in
    monkeypatch.delitem(sys.modules, "fla")
