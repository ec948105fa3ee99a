"""Which backend is chosen, and when it is refused."""

from __future__ import annotations

import pytest
import torch

from megatron.mimo.backend import cpu, select_backend


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before any selection; nothing gets patched, because every path under test refuses."""
    monkeypatch.setattr(cpu, "_applied", False)


def test_cpu_is_kept_once_selected() -> None:
    assert select_backend("cpu") == "cpu"
    assert cpu.is_applied()
    assert select_backend() == "cpu"


def test_apply_twice_changes_nothing() -> None:
    cpu.apply()
    import megatron.core.jit

    before = dict(vars(megatron.core.jit))
    cpu.apply()
    assert vars(megatron.core.jit) == before


def test_refuses_initialised_cuda(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is initialised in this process"):
        cpu.apply()
    assert not cpu.is_applied()


def test_refuses_nccl_groups(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with pytest.raises(RuntimeError, match="the default process group uses 'nccl'"):
        select_backend("cpu")


def test_cuda_after_cpu_is_refused() -> None:
    select_backend("cpu")
    with pytest.raises(RuntimeError, match="'cpu' has been selected in this process"):
        select_backend("cuda")


def test_cuda_without_a_device_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no usable CUDA device"):
        select_backend("cuda")


def test_cuda_is_chosen_where_it_is_usable(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_backend() == "cuda"
    assert not cpu.is_applied()


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        select_backend("tpu")
