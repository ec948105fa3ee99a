"""flash-linear-attention's kernels against PyTorch's, in bf16 on a GPU; and who gets them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mimo.layers.gated_delta_net.sizes import Sizes

G, R, D, TAPS = 2, 2, 64, 4
CPU = torch.device("cpu")
SIZES = Sizes(key_heads=G, values_per_key=R, key=D, value=D, taps=TAPS)


def documents(lengths: list[int] | None, device: str) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.mimo.layers.gated_delta_net.documents import documents_of

    if lengths is None:
        return None
    sums = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=sums, cu_seqlens_kv=sums)
    return documents_of(packed, tokens=sum(lengths) + 5, device=torch.device(device))


def run(kernels: Any, lengths: list[int] | None, device: str) -> dict[str, Tensor]:
    """The three steps one behind the other, with all gradients."""
    generator = torch.Generator().manual_seed(2)
    T = 205 if lengths is None else sum(lengths) + 5
    width = 2 * D + R * D
    shapes = {
        "x": (1, T, G, width),
        "weight": (G, width, TAPS),
        "decay": (1, T, G, R),
        "strength": (1, T, G, R),
        "gate": (1, T, G, R, D),
        "norm": (D,),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["decay"], drawn["strength"] = -drawn["decay"].exp(), drawn["strength"].sigmoid()
    leaves = {
        name: (one if name in ("decay", "strength") else one.bfloat16()).to(device).requires_grad_()
        for name, one in drawn.items()
    }
    where = documents(lengths, device)
    convolved = kernels.convolve(leaves["x"], leaves["weight"], where)
    q, k, v = convolved.split([D, D, R * D], dim=-1)
    mixed, _ = kernels.delta_rule(
        q, k, v.unflatten(-1, (R, D)), leaves["decay"], leaves["strength"], where
    )
    out = kernels.norm(mixed, leaves["gate"], leaves["norm"], 1e-6)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return {"output": out.detach(), **{name: one.grad for name, one in leaves.items()}}


def skip_without_kernels() -> None:
    from megatron.mimo.layers.gated_delta_net.fla_kernels import _refusal, is_usable

    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    refusal = _refusal()
    if refusal is not None:
        pytest.skip(f"the package refuses this machine: {refusal}")
    assert is_usable()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [64, 1, 0, 100, 30]], ids=["row", "packed"])
def test_equals_pytorch(lengths: list[int] | None) -> None:
    from megatron.mimo.layers.gated_delta_net.fla_kernels import FlaKernels
    from megatron.mimo.layers.gated_delta_net.kernels import PyTorchKernels

    skip_without_kernels()
    expected = run(PyTorchKernels(), lengths, "cuda")
    found = run(FlaKernels(), lengths, "cuda")
    for name, got in found.items():
        error = (got.float() - expected[name].float()).norm() / expected[name].float().norm()
        assert error < 2e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.gpu
def test_passes_its_trial() -> None:
    """With pieces, whose states context parallelism passes on; a refusal is the warning's."""
    from megatron.mimo.layers.gated_delta_net.fla_kernels import FlaKernels
    from megatron.mimo.layers.gated_delta_net.kernel_trial import why_not_equal
    from megatron.mimo.layers.gated_delta_net.kernels import PyTorchKernels

    skip_without_kernels()
    reason = why_not_equal(
        FlaKernels(),
        PyTorchKernels(),
        sizes=SIZES,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    assert reason is None


def test_who_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.mimo.backend import capabilities
    from megatron.mimo.layers.gated_delta_net import kernels

    monkeypatch.setattr(kernels, "is_usable", lambda: True)
    monkeypatch.setattr(kernels, "why_not_equal", lambda *_, **__: None)
    here = dataclasses.replace(capabilities(), flash_linear_attention="0.6.0")
    on_gpu = dataclasses.replace(here, device="another")
    for found, dtype, deterministic, expected in (
        (here, torch.bfloat16, False, "PyTorchKernels"),
        (on_gpu, torch.bfloat16, False, "FlaKernels"),
        (on_gpu, torch.float32, False, "PyTorchKernels"),
        (on_gpu, torch.bfloat16, True, "PyTorchKernels"),
        (
            dataclasses.replace(on_gpu, flash_linear_attention=None),
            torch.bfloat16,
            False,
            "PyTorchKernels",
        ),
    ):
        monkeypatch.setattr(kernels, "capabilities", lambda found=found: found)
        kernels._trial.cache_clear()
        chosen = kernels.fast_kernels(dtype, CPU, sizes=SIZES, deterministic=deterministic)
        assert type(chosen).__name__ == expected
    monkeypatch.setattr(kernels, "capabilities", lambda: on_gpu)
    monkeypatch.setattr(kernels, "why_not_equal", lambda *_, **__: "no compiler")
    kernels._trial.cache_clear()
    with pytest.warns(UserWarning, match="not used \\(no compiler\\)"):
        chosen = kernels.fast_kernels(torch.bfloat16, CPU, sizes=SIZES, deterministic=False)
    assert type(chosen).__name__ == "PyTorchKernels"
    kernels._trial.cache_clear()


def test_a_refusal_is_known_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.mimo.layers.gated_delta_net import fla_kernels

    def refusing(*_: Tensor, g: Tensor) -> None:
        raise RuntimeError(f"Triton 3.6 is wrong here, {g.numel()}\nmore")

    def going_on(q: Tensor, *_: Tensor, g: Tensor) -> int:
        return q.shape[3] + g.numel()

    def wrong(*_: Tensor, g: Tensor) -> None:
        raise RuntimeError(f"CUDA: {g.numel()}")

    for name, part in fla_kernels._PARTS.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{part: None}))
    parents = ("fla", "fla.modules", "fla.modules.norm", "fla.ops", "fla.ops.common")
    for name in parents:
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
    for step, expected in ((going_on, None), (wrong, None), (refusing, "Triton 3.6 is wrong here")):
        part = SimpleNamespace(chunk_bwd_dqkwg=step)
        monkeypatch.setitem(sys.modules, "fla.ops.common.chunk_o", part)
        fla_kernels.is_usable.cache_clear()
        if expected is None:
            assert fla_kernels.is_usable()
        else:
            with pytest.warns(UserWarning, match=expected):
                assert not fla_kernels.is_usable()
    fla_kernels.is_usable.cache_clear()


def test_the_trial_tells_right_from_wrong() -> None:
    from megatron.mimo.layers.gated_delta_net.kernel_trial import why_not_equal
    from megatron.mimo.layers.gated_delta_net.kernels import PyTorchKernels

    class Wrong(PyTorchKernels):
        def norm(self, *arguments: Any) -> Tensor:
            return 1.1 * super().norm(*arguments)

    class Failing(PyTorchKernels):
        def convolve(self, *_: Any) -> Tensor:
            raise RuntimeError("no compiler\nmore")

    def tried(kernels: Any) -> str | None:
        return why_not_equal(
            kernels, PyTorchKernels(), sizes=SIZES, dtype=torch.bfloat16, device=CPU
        )

    assert tried(PyTorchKernels()) is None
    assert tried(Wrong()) == "the output differs from PyTorch's by 1.0e-01, relatively"
    assert tried(Failing()) == "RuntimeError: no compiler"


def test_borders_for_the_package() -> None:
    from megatron.mimo.layers.gated_delta_net.fla_kernels import _sums_of_pieces

    device, host = _sums_of_pieces((0, 3, 10), 2, CPU)
    assert device.tolist() == host.tolist() == [0, 3, 10, 13, 20]
    where = documents([3, 0, 2, 0], "cpu")
    device, host = where.filled_sums
    # Documents that have tokens, and what lies behind the last.
    assert device.tolist() == host.tolist() == [0, 3, 5, 10]
    assert host.dtype == torch.int64
    assert where.number_T.tolist() == [0, 0, 0, 2, 2, 4, 4, 4, 4, 4]
    assert where.position_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
