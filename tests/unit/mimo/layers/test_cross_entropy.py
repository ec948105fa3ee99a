"""The kernels of the cross-entropy compute what plain torch does, and the loss by them is the plain
one: in Triton's interpreter, and on a GPU at the size of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron.mimo.layers import vocabulary_loss
from megatron.mimo.layers.fused import cross_entropy
from tests.unit.core.mimo.interpreted import interpreted

KERNELS = "megatron.mimo.layers.fused.cross_entropy_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def close(one: Tensor, other: Tensor) -> None:
    """To 1e-6; half precision to a rounding."""
    tolerance = 1e-6 if one.dtype == torch.float32 else 2 * torch.finfo(one.dtype).eps
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("words", "width", "first"),
    [
        (4096, 4096, 0),
        (8200, 8201, 0),  # blocks that are not full, one column of padding
        (300, 300, 150),  # labels of other ranks on both sides
        (0, 64, 300),  # nothing but padding
        (0, 0, 0),
    ],
)
def test_kernels_compute_what_plain_torch_does(words: int, width: int, first: int) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(3)
    labels_C = torch.tensor([first, first + max(words - 1, 0), 0, 500, -100])
    grad_C = torch.rand(5, generator=generator)
    with interpreted(KERNELS) as kernels:
        for dtype in DTYPES:
            logits_CV = 9 * torch.randn(5, width, generator=generator).to(dtype)
            if words > 300:
                logits_CV[0, 200] = 90  # nothing beside it
                logits_CV[1, -2] = 90
            found, expected = torch.full((2, 2, 8), 7.0)
            for way, sums_2T in ((kernels.launch_sums, found), (cross_entropy._plain, expected)):
                way(logits_CV, labels_C, first, words, sums_2T[:, 2:7])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            scale_C = found[0, 2:7].clone().clamp(min=0)
            other_CV = logits_CV.clone()
            for back, there_CV in (
                (kernels.launch_gradient, logits_CV),
                (cross_entropy._plain_backward, other_CV),
            ):
                back(there_CV, labels_C, first, words, scale_C, grad_C)
            close(logits_CV, other_CV)
            assert not logits_CV[:, words:].any()


def test_triton_compiles_after_it_has_interpreted() -> None:
    tl = pytest.importorskip("triton.language")
    before = [dict(vars(one)) for one in (tl, tl.core, tl.tensor)]
    with interpreted(KERNELS) as kernels:
        sums_2T = torch.empty(2, 1)
        kernels.launch_sums(torch.zeros(1, 8), torch.zeros(1).long(), 0, 8, sums_2T)
        assert float(sums_2T[0]) == pytest.approx(math.log(8))
    assert [dict(vars(one)) for one in (tl, tl.core, tl.tensor)] == before


def inputs(
    tokens: int, words: int, hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels, and the weights of the losses in their sum."""
    generator = torch.Generator().manual_seed(4)
    hidden_TH = torch.randn(tokens, hidden, generator=generator)
    weight_VH = 2 * hidden**-0.5 * torch.randn(words, hidden, generator=generator)
    labels_T = torch.randint(0, words, (tokens,), generator=generator)
    weights_T = torch.rand(tokens, generator=generator)
    hidden_TH, weight_VH = (one.to(device, dtype) for one in (hidden_TH, weight_VH))
    return hidden_TH, weight_VH, labels_T.to(device), weights_T.to(device)


def in_pieces(given: tuple[Tensor, ...], words: int, piece: int) -> list[Tensor]:
    """Losses and gradients of hidden states and weight; ``words`` rows of it are no padding."""
    hidden_TH, weight_VH, labels_T, weights_T = given
    leaves = [one.clone().requires_grad_() for one in (hidden_TH, weight_VH)]
    losses_T = vocabulary_loss.chunked_cross_entropy(
        *leaves, labels_T, first=0, group=dist.ProcessGroup(0, 1), words=words, piece=piece
    )
    (losses_T * weights_T).sum().backward()
    return [losses_T.detach(), *(one.grad for one in leaves if one.grad is not None)]


def plain(given: tuple[Tensor, ...], words: int, dtype: torch.dtype) -> list[Tensor]:
    """The same by whole logits, their product in ``dtype``."""
    hidden_TH, weight_VH, labels_T, weights_T = given
    leaves = [one.to(dtype, copy=True).requires_grad_() for one in (hidden_TH, weight_VH)]
    logits_TV = (leaves[0] @ leaves[1].t())[:, :words]
    wide = torch.promote_types(dtype, torch.float32)
    losses_T = F.cross_entropy(logits_TV.to(wide), labels_T, reduction="none")
    (losses_T * weights_T).sum().backward()
    return [losses_T.detach(), *(one.grad for one in leaves if one.grad is not None)]


def check(given: tuple[Tensor, ...], words: int, piece: int, exact: torch.dtype) -> None:
    """In fp32 equal to whole logits in ``exact``; in half precision as near to them as others."""
    found, expected = in_pieces(given, words, piece), plain(given, words, exact)
    if given[0].dtype == torch.float32:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=2e-6)
        return
    rounded = plain(given, words, given[0].dtype)
    for one, half, other in zip(found, rounded, expected, strict=True):
        errors = [float((each.to(exact) - other).norm() / other.norm()) for each in (one, half)]
        assert errors[0] < 1.5 * errors[1] + 1e-3
        assert errors[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_by_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in several; the last words are padding."""
    pytest.importorskip("triton")
    given = inputs(37, 300, 16, dtype)
    given[2].clamp_(max=289)
    with interpreted(KERNELS) as kernels:
        monkeypatch.setattr(vocabulary_loss, "sums_of_logits", kernels.launch_sums)
        monkeypatch.setattr(vocabulary_loss, "gradient_of_logits_", kernels.launch_gradient)
        for piece in (2**20, 10_000):
            check(given, 290, piece, torch.float64)
        empty = inputs(0, 300, 16, dtype)
        assert [one.count_nonzero() for one in in_pieces(empty, 290, 10_000)] == [0, 0, 0]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """At the size of a run; nothing waits for the device."""
    for dtype, tokens, rows, hidden in (
        (torch.bfloat16, 4001, 32_128, 2048),
        (torch.float16, 777, 32_128, 512),
        (torch.float32, 777, 32_003, 512),  # rows that no vector of a kernel fits
    ):
        given = inputs(tokens, rows, hidden, dtype, "cuda")
        given[2].clamp_(max=31_999)
        for piece in (vocabulary_loss.PIECE, 40 * 2**20):
            in_pieces(given, 32_000, piece)  # the first compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                in_pieces(given, 32_000, piece)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            check(given, 32_000, piece, torch.float64 if dtype == torch.float32 else torch.float32)


@pytest.mark.wide
@pytest.mark.parametrize("kernel", ["_sums", "_gradient"])
def test_kernels_compile_for_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """Down to machine code that reads vectors: the interpreter takes more than a compiler."""
    triton = pytest.importorskip("triton")
    from megatron.mimo.layers.fused import cross_entropy_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function: Any = getattr(cross_entropy_kernels, kernel)
    types = {"logits": "*bf16", "labels": "*i64", "BLOCK": "constexpr"}
    types |= dict.fromkeys(("sums", "scale", "grad"), "*fp32")
    names = [one.name for one in function.params]
    source = triton.compiler.ASTSource(
        function,
        {name: types.get(name, "i32") for name in names},
        {"BLOCK": 4096},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits", "V")},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": 8})
    assert made.asm["cubin"]
    assert made.asm["ptx"].count("ld.global.v4") == 2
    assert made.asm["ptx"].count("st.global.v4") == (2 if kernel == "_gradient" else 0)
