"""Fused operators: their values, their gradients, and the kernels that compute them on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.core.mimo.interpreted import interpreted


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 R of 10 features by their definition; cosines and sines [T, R]."""
    first, second, rest = heads.split((cos.size(-1), cos.size(-1), 10 - 2 * cos.size(-1)), dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def activated(inner: Tensor, kind: str, gated: bool) -> Tensor:
    first, gate = inner.chunk(2, dim=-1) if gated else (inner, None)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    value: Tensor = functions[kind](first)
    return value if gate is None else value * gate


def rotation_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Slices of one product [6, 11 heads + 2, 10], and a turn for every two tokens."""
    mixed = torch.randn(6, 13, 10)
    angles = torch.randn(3, 4)
    return mixed[:, :9], mixed[:, 9:11], torch.cat([angles.cos(), angles.sin()], dim=1)


def check_rotation(device: str, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    from megatron.mimo.layers.fused import rotate

    q, k, turns = (one.to(device) for one in rotation_inputs())
    q, k = (one.to(dtype).requires_grad_() for one in (q, k))
    cos, sin = (one.repeat_interleave(2, dim=0) * 1.5 for one in turns.chunk(2, dim=1))
    found = rotate(q, k, turns, scale=1.5)
    expected = [rotated(one.float(), cos, sin) for one in (q, k)]
    weights = [torch.randn_like(one) for one in expected]
    for results in (found, expected):
        sums = [(one * weight).sum() for one, weight in zip(results, weights, strict=True)]
        torch.stack(sums).sum().backward()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)
    again = [one.detach().float().requires_grad_() for one in (q, k)]
    for one, weight in zip(again, weights, strict=True):
        (rotated(one, cos, sin) * weight).sum().backward()
    for one, other in zip((q, k), again, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        # Both passes of above have left a gradient each.
        torch.testing.assert_close(one.grad.float() / 2, other.grad, rtol=tolerance, atol=tolerance)


def check_heads(device: str) -> None:
    """One operation is a split, :func:`rotate` and a copy of the values, gradients included."""
    from megatron.mimo.layers.fused import rotate, turn_heads

    turns = rotation_inputs()[2].to(device)
    mixed = torch.randn(3, 2, 2, 50, device=device, requires_grad=True)  # [S, B, G, W]
    found = turn_heads(mixed, turns, 10, scale=1.5)
    assert all(one.is_contiguous() for one in found)
    q, k, v = mixed.split((30, 10, 10), dim=-1)
    expected = (*rotate(q.reshape(3, 2, 6, 10), k, turns, scale=1.5), v)
    weights = [torch.randn_like(one) for one in expected]
    gradients = [torch.autograd.grad(heads, mixed, weights) for heads in (found, expected)]
    for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def check_activation(device: str, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    from megatron.mimo.layers.fused import KINDS, activate

    for kind in KINDS:
        for gated in (False, True):
            inner = torch.randn(15, 24, device=device, dtype=dtype, requires_grad=True)
            found = activate(inner, kind, gated=gated)
            wide = inner.detach().double().requires_grad_()
            expected = activated(wide, kind, gated)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
            weight = torch.randn_like(found)
            (gradient,) = torch.autograd.grad(found, inner, weight)
            (wanted,) = torch.autograd.grad(expected, wide, weight.double())
            torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def norm_by_torch(
    residual: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, kind: Any
) -> tuple[Tensor, Tensor]:
    total = residual if added is None else residual.view(added.shape) + added
    total = total.reshape(-1, len(weight))
    weight = weight + 1 if kind.zero_centered else weight
    if kind.rms:
        return total, F.rms_norm(total, weight.shape, weight, kind.eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, kind.eps)


def check_norm(
    device: str,
    tolerance: float,
    dtype: torch.dtype,
    sizes: tuple[int, int] = (6, 24),
    *,
    rms: bool = False,
    zero_centered: bool = False,
    has_bias: bool = False,
    adds: bool = True,
    frozen: bool = False,
    uses: tuple[bool, bool] = (True, True),
) -> None:
    """Against torch in fp32 at least: results, and gradients by those of the results in use."""
    from megatron.mimo.layers.fused import add_norm
    from megatron.mimo.layers.norm import Kind

    T, E = sizes
    given: list[Tensor | None] = [
        torch.randn(T, E, dtype=dtype, device=device, requires_grad=True),
        # As a fused attention leaves samples: [B, S, E] in memory.
        torch.randn(2, T // 2, E, dtype=dtype, device=device, requires_grad=True),
        torch.randn(E, dtype=dtype, device=device, requires_grad=not frozen),
        torch.randn(E, dtype=dtype, device=device, requires_grad=not frozen),
    ]
    given[1] = given[1] if adds else None
    given[3] = given[3] if has_bias else None
    wide_dtype = torch.promote_types(dtype, torch.float32)
    wide = [None if one is None else one.detach().to(wide_dtype) for one in given]
    for one, other in zip(wide, given, strict=True):
        if one is not None and other is not None:
            one.requires_grad_(other.requires_grad)
    kind = Kind(eps=1e-5, rms=rms, zero_centered=zero_centered)

    def results_and_gradients(inputs: list[Any], function: Any) -> list[Tensor]:
        residual, added, *parameters = inputs
        added = None if added is None else added.transpose(0, 1)
        results = function(residual, added, *parameters)
        torch.manual_seed(2)
        seeds = [torch.randn(T, E, dtype=dtype, device=device) for _ in range(2)]
        pairs = [(one, seed) for one, seed, use in zip(results, seeds, uses, strict=True) if use]
        wanted = [one for one in inputs if one is not None and one.requires_grad]
        outputs, ours = zip(*((one, seed.to(one.dtype)) for one, seed in pairs), strict=True)
        gradients = torch.autograd.grad(outputs, wanted, ours, allow_unused=True)
        return [*results, *(one for one in gradients if one is not None)]

    found = results_and_gradients(given, lambda *four: add_norm(*four, kind))
    expected = results_and_gradients(wide, lambda *four: norm_by_torch(*four, kind))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        error = (one - other).norm() / other.norm().clamp(min=1e-6)
        assert error < tolerance, f"{error:.1e}"


NORMS: tuple[dict[str, Any], ...] = (
    {"rms": True},
    {"rms": True, "zero_centered": True, "adds": False},
    {"rms": True, "frozen": True},
    {"has_bias": True},
    {"has_bias": True, "zero_centered": True},
    {"has_bias": True, "adds": False, "frozen": True},
    {"has_bias": False},
    {"rms": True, "uses": (False, True)},
    {"has_bias": True, "uses": (False, True), "adds": False},
    {"rms": True, "uses": (True, False)},
    {"rms": True, "sizes": (0, 24)},
)


def test_values_and_gradients() -> None:
    check_rotation("cpu", 1e-6)
    check_heads("cpu")
    check_activation("cpu", 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_and_the_addition_before_it(dtype: torch.dtype) -> None:
    for case in NORMS:
        check_norm("cpu", 2e-6, dtype, **case)


class Wanted(TorchDispatchMode):
    """How many gradients of parameters each backward pass of a norm is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.megatron_mimo.norm_backward.default:
            self.counts.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_gradients_of_frozen_norms_are_not_computed() -> None:
    with Wanted() as wanted:
        check_norm("cpu", 2e-6, torch.float32, has_bias=True)
        check_norm("cpu", 2e-6, torch.float32, rms=True)
        check_norm("cpu", 2e-6, torch.float32, has_bias=True, frozen=True)
    assert wanted.counts == [2, 1, 0]


def test_in_bfloat16_only_the_result_is_rounded() -> None:
    check_rotation("cpu", 2**-7, torch.bfloat16)
    check_activation("cpu", 2**-7, torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check_rotation("cuda", 1e-6)
    check_heads("cuda")
    check_activation("cuda", 5e-6)
    check_rotation("cuda", 2**-7, torch.bfloat16)
    check_activation("cuda", 2**-7, torch.bfloat16)
    with Wanted() as wanted:  # what looks on sees operators, not launches past torch's dispatch
        check_norm("cuda", 2e-6, torch.float32, rms=True)
    assert wanted.counts == [1]
    for case in NORMS:
        check_norm("cuda", 2e-6, torch.float32, **case)
        check_norm("cuda", 2**-7, torch.bfloat16, **case)
    check_norm("cuda", 2e-6, torch.float64, has_bias=True)
    check_norm("cuda", 2**-7, torch.bfloat16, (7936, 2048), rms=True)
    check_norm("cuda", 2**-7, torch.bfloat16, (4616, 1024), has_bias=True)
    check_norm("cuda", 2**-7, torch.float16, (300, 7000), has_bias=True)


def norm_gradients() -> Iterator[tuple[Any, ...]]:
    """What a kernel is given: RMSNorm and LayerNorm, gradients that are wanted or there or not."""
    for rms, adds, zero_centered, wanted, dtype, rows in (
        (True, True, False, 1, torch.float32, 5),
        (True, False, True, 1, torch.bfloat16, 5),
        (True, True, False, 0, torch.float32, 1),
        (False, True, True, 2, torch.float32, 5),
        (False, False, False, 1, torch.float32, 3),
        (False, True, False, 0, torch.bfloat16, 2),
        (True, False, False, 1, torch.float32, 0),
    ):
        of_normed, of_total, total = (torch.randn(rows, 70, dtype=dtype) for _ in range(3))
        mean, rstd = torch.randn(rows, 1), torch.rand(rows, 1) + 0.5
        weight = torch.randn(70, dtype=dtype)
        added, mean = (of_total if adds else None), (None if rms else mean)
        yield of_normed, added, total, weight, mean, rstd, zero_centered, wanted


def test_kernels_compute_what_plain_torch_does() -> None:
    pytest.importorskip("triton")
    with interpreted("megatron.mimo.layers.fused.kernels") as kernels:
        kernels._AT_A_TIME = 256  # features: two programs of a norm for five rows
        check_kernels(kernels)


def check_kernels(kernels: Any) -> None:
    from megatron.mimo.layers.fused import activation, norm, rotation

    turned, norms = rotation_inputs(), list(norm_gradients())
    mixed = (torch.randn(6, 2, 50), turned[2])  # three queries for a key
    # Strided in tokens and heads, as slices of what an attention gives.
    heads = torch.randn(6, 20, 10)[:, ::2].split((6, 2, 2), dim=1)
    inners = [(torch.randn(3, 1030), torch.randn(3, 1030 * width)) for width in (1, 2)]
    found = [
        *kernels.launch_rotation(*turned, 1.5, False),
        *kernels.launch_rotation(*turned, 1.5, True),
        *kernels.launch_heads(*mixed, 1.5, 10),
        kernels.launch_heads_back(*heads, turned[2], 1.5),
    ]
    expected = [
        *rotation._plain(*turned, 1.5, False),
        *rotation._plain(*turned, 1.5, True),
        *rotation._plain_heads(*mixed, 1.5, 10),
        rotation._plain_heads_back(*heads, turned[2], 1.5),
    ]
    for kind in range(4):
        for gated, (grad, inner) in zip((False, True), inners, strict=True):
            found.append(kernels.launch_activation(inner, kind, gated))
            found.append(kernels.launch_activation_backward(grad, inner, kind, gated))
            expected.append(activation._plain_forward(inner, kind, gated))
            expected.append(activation._plain_backward(grad, inner, kind, gated))
    for given in norms:
        found += kernels.launch_norm_backward(*given)
        expected += norm._plain_backward(*given)
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-5 if one.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["_mixed_heads", "_mixed_heads back", "_norm_backward"])
def test_kernels_compile_for_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Down to its machine code, which needs no card: the interpreter takes more than a compiler."""
    triton = pytest.importorskip("triton")
    from megatron.mimo.layers.fused import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes: dict[str, Any]
    if name == "_norm_backward":
        sizes = {"E": 1152, "RMS": False, "ADDS": True, "WANTED": 2, "BLOCK": 2048}
        types = dict.fromkeys(("of_normed", "of_total", "total", "weight", "out"), "*bf16")
        types |= dict.fromkeys(("mean", "rstd", "sums"), "*fp32") | {"base": "fp32"}
    else:
        sizes = {"SHARE": 7, "D": 80, "R": 20, "BACK": "back" in name}  # some features stay
        sizes |= {"BLOCK_H": 8, "BLOCK_R": 32, "BLOCK_D": 64, "BLOCK": 128}
        types = dict.fromkeys(("mixed", "q", "k", "v"), "*bf16")
        types |= {"turns": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(sizes, "constexpr")
    function = getattr(kernels, name.split()[0])
    signature = {one.name: types.get(one.name, "i32") for one in function.params}
    source = triton.compiler.ASTSource(function, signature, sizes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert triton.compile(source, target=target).asm["cubin"]
