"""No TF32 where equality is claimed, Transformer Engine's products and child processes included."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.core.models.mimo.errors import MimoError
from megatron.mimo.backend.exact import forbid_tf32
from megatron.mimo.convert.verify import verify_checkpoint, verify_tiny


@pytest.fixture
def with_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.usefixtures("with_tf32")
def test_products_are_in_fp32() -> None:
    forbid_tf32()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"  # what cuBLAS asks, whoever calls it
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("with_tf32")
@pytest.mark.parametrize(
    "verify",
    [lambda here: verify_tiny("no such family"), lambda here: verify_checkpoint(here, here)],
)
def test_verify_forbids_tf32_before_anything_else(
    verify: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(MimoError):
        verify(tmp_path)
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
