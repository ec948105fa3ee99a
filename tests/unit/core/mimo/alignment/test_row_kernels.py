"""Rows placed and gathered by Triton's kernels equal those of torch, in Triton's interpreter.

Legend: S sequence, B micro-batch, H hidden, N rows of one stream, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rank_pool import RankPool
from tests.unit.core.mimo.interpreted import interpreted_kernels
from tests.unit.core.mimo.model.merging.test_embedding import table

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
IMAGE, AUDIO, WORDS = 40, 41, 32
SPECIAL = {"images": IMAGE, "audio": AUDIO}


def batch(kind: str) -> Tensor:
    """Token ids [B, S] of a kind."""
    generator = torch.Generator().manual_seed(5)
    ids_BS = torch.randint(0, WORDS, (2, 120), generator=generator)
    ids_BS[:, 40:110] = 7  # 140 times one word: a sum of sums
    if kind == "text":
        return ids_BS
    if kind == "media":
        return torch.randint(IMAGE, IMAGE + 2, (3, 8), generator=generator)
    ids_BS[0, 3:20], ids_BS[1, 30:39], ids_BS[1, 115:], ids_BS[0, ::17] = IMAGE, IMAGE, IMAGE, AUDIO
    return ids_BS[:, ::3].reshape(1, -1) if kind == "packed" else ids_BS


def plans(ids_BS: Tensor) -> dict[str, Any]:
    """A whole plan, one with another order of rows, and the share of a context-parallel rank."""
    from megatron.core.models.mimo.alignment import RowOrder, build_alignment_plan, cut_plan
    from megatron.core.models.mimo.alignment.cut import with_own_rows

    whole = build_alignment_plan(ids_BS, SPECIAL)
    generator = torch.Generator().manual_seed(6)
    mixed_N = torch.randperm(whole.counts["images"], generator=generator)
    order = {"images": RowOrder(sources_N=mixed_N, encoders=("a", "b"))}
    ordered = build_alignment_plan(ids_BS, SPECIAL, row_order=order)
    cut = cut_plan(ordered, torch.arange(ids_BS.size(1))[1::2])
    return {"whole": whole, "ordered": ordered, "cut": cut, "own": with_own_rows(cut)}


def merged(plan: Any, module: Any, rows: Mapping[str, Tensor], frozen: str = "") -> list[Any]:
    """What is merged, and the gradients of the table and of every modality."""
    from types import SimpleNamespace

    from megatron.core.models.mimo.model.merging.merge import embed_streams

    embedding: Any = SimpleNamespace(
        word_embeddings=module,
        config=SimpleNamespace(fp32_residual_connection=False, sequence_parallel=False),
        tp_group=None,
        add_position_embedding=False,
        embedding_dropout=torch.nn.Identity(),
    )
    module.weight.grad = None
    module.weight.requires_grad_(frozen != "text")
    given = {
        name: one.detach().requires_grad_(frozen != name) for name, one in rows.items() if len(one)
    }
    merged_SBH = embed_streams(embedding, plan, given, None)
    generator = torch.Generator().manual_seed(8)
    grad_SBH = torch.randn(merged_SBH.shape, generator=generator).to(merged_SBH.dtype)
    if merged_SBH.requires_grad:
        merged_SBH.backward(grad_SBH)
    return [merged_SBH.detach(), module.weight.grad, *(one.grad for one in given.values())]


def check_equal(found: list[Any], expected: list[Any]) -> None:
    """Rows and their gradients to the bit; sums of a word's gradients as near as one rounding."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if other is None or number != 1:
            assert (one is None) == (other is None)
            assert other is None or torch.equal(one, other)
            continue
        rtol = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[other.dtype]
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


def merging(dtype: torch.dtype, hidden: int, cases: list[tuple[str, str]]) -> None:
    from megatron.core.models.mimo.alignment import with_row_index

    module = table(WORDS, hidden=hidden).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with interpreted_kernels() as kernels:
        calls = counted(kernels)
        for kind, name in cases:
            plan = plans(batch(kind))[name]
            rows = {
                modality: torch.randn(count, hidden, generator=generator).to(dtype)
                for modality, count in plan.counts.items()
            }
            for frozen in ("", "text", "images") if name == "cut" else ("",):
                expected = merged(plan, module, rows, frozen)
                assert not calls
                found = merged(with_row_index(plan), module, rows, frozen)
                check_equal(found, expected)
                some = any(one is not None for one in found[1:])
                assert calls == ["place", "gather_sums"][: 1 + some]
                calls.clear()


def counted(kernels: Any) -> list[str]:
    """The names of the kernels' functions as they are called from now on."""
    calls: list[str] = []
    for name in ("place", "gather_sums", "look_up"):
        function = getattr(kernels, name)

        def call(*args: Any, name: str = name, function: Any = function, **keywords: Any) -> Any:
            calls.append(name)
            return function(*args, **keywords)

        setattr(kernels, name, call)
    return calls


CASES = [
    *(("samples", "ordered"), ("samples", "cut"), ("packed", "whole"), ("text", "cut")),
    *(("media", "whole"), ("media", "own")),
]


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "hidden", "cases"),
    [
        (torch.float32, 20, CASES),
        pytest.param(torch.bfloat16, 1100, [("packed", "cut")], marks=pytest.mark.wide),
        pytest.param(
            torch.float16, 1, [("samples", "ordered"), ("samples", "own")], marks=pytest.mark.wide
        ),
    ],
    ids=["float32", "bfloat16 in several blocks of columns", "float16"],
)
def test_merging_by_kernels_equals_torchs(
    ranks: RankPool, dtype: torch.dtype, hidden: int, cases: list[tuple[str, str]]
) -> None:
    ranks(1)(merging, dtype, hidden, cases)


def merging_with_hooks() -> None:
    """Where somebody looks at the rows of text, there are such rows."""
    from megatron.core.models.mimo.alignment import with_row_index

    plan, module = plans(batch("samples"))["cut"], table(WORDS)
    rows = {name: torch.randn(count, 16) for name, count in plan.counts.items()}
    expected, seen = merged(plan, module, rows), []
    with interpreted_kernels():
        for register in (module.register_forward_hook, module.register_full_backward_hook):
            handle = register(lambda *_: seen.append(1))
            check_equal(merged(with_row_index(plan), module, rows), expected)
            handle.remove()
        module.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].shape))
        check_equal(merged(with_row_index(plan), module, rows), expected)
    assert seen == [1, 1, (1, plan.text_ids_N.numel())]


def levels() -> None:
    from megatron.core.models.mimo.alignment import with_row_index
    from megatron.core.models.mimo.model.merging.levels import LevelRows

    plan = plans(batch("samples"))["cut"]
    generator = torch.Generator().manual_seed(9)
    for hidden_dtype in (torch.float32, torch.bfloat16):
        hidden_SBH = torch.randn(plan.sequence_length, 2, 24, generator=generator).to(hidden_dtype)
        rows = {name: torch.randn(count, 24).bfloat16() for name, count in plan.counts.items()}
        results = []
        with interpreted_kernels():
            for held in (plan, with_row_index(plan)):
                given = {name: one.clone().requires_grad_() for name, one in rows.items()}
                given["audio"].requires_grad_(False)
                before_SBH = hidden_SBH.clone().requires_grad_()
                after_SBH = LevelRows(rows=given, plan=held, tp_group=None).add_to(before_SBH)
                after_SBH.backward(hidden_SBH * 2)
                results.append([after_SBH, before_SBH.grad, given["images"].grad])
                assert given["audio"].grad is None
        (after, *grads), (after_by_kernels, *grads_by_kernels) = results
        assert all(map(torch.equal, grads, grads_by_kernels))
        # the interpreter rounds to bf16 towards zero
        rtol = 0.0 if hidden_dtype is torch.float32 else 8e-3
        torch.testing.assert_close(after_by_kernels, after, rtol=rtol, atol=rtol)


def what_they_do_not_serve() -> None:
    """Without CUDA and interpreter, of other dtypes, and of many modalities."""
    from megatron.core.models.mimo.alignment import build_alignment_plan, with_row_index
    from megatron.core.models.mimo.alignment.kernel_trial import why_no_kernels
    from megatron.core.models.mimo.alignment.row_index import kernels_for
    from megatron.core.models.mimo.model.merging.merge import merge_streams

    plan = with_row_index(build_alignment_plan(batch("samples"), SPECIAL))
    rows = {"text": torch.randn(plan.text_ids_N.numel(), 3)} | {
        name: torch.randn(count, 3) for name, count in plan.counts.items()
    }
    merged_SBH = merge_streams(plan, rows)
    assert kernels_for(plan.index, merged_SBH) is None
    assert "on cpu" in str(why_no_kernels(torch.device("cpu")))
    many = {f"m{number}": 100 + number for number in range(6)}
    wide = with_row_index(build_alignment_plan(batch("text"), many))
    with interpreted_kernels() as kernels:
        assert torch.equal(merge_streams(plan, rows), merged_SBH)
        assert kernels_for(plan.index, merged_SBH) is kernels
        assert kernels_for(plan.index, merged_SBH.double()) is None
        assert kernels_for(wide.index, merged_SBH) is None
        assert why_no_kernels(torch.device("cpu")) is None
        right = kernels.gather_sums
        kernels.gather_sums = lambda *args, **keywords: None
        assert why_no_kernels(torch.device("cpu")) == "their results differ from torch's"
        kernels.gather_sums = right


@needs_triton
@pytest.mark.parametrize("check", [merging_with_hooks, levels, what_they_do_not_serve])
def test_other_ways_of_merging(ranks: RankPool, check: Any) -> None:
    ranks(1)(check)


@needs_triton
def test_the_kernels_compile_for_a_gpu() -> None:
    """Without one, with the compiler that Triton brings; and read and write 16 bytes at once."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron.core.models.mimo.alignment import row_kernels

    rows = dict.fromkeys(["out", "base", "grad", *(f"s{n}" for n in range(6))], "*bf16")
    types = {**rows, **dict.fromkeys([f"o{n}" for n in range(6)], "*bf16"), "parts": "*fp32"}
    types |= {"sources": "*i64", "ids": "*i64", "targets": "*i64", "entries": "*i32"}
    types |= {"starts": "*i32"}
    numbers = ("given_bits", "wanted_bits", "places", "first_sum", "width", "first", "words")
    types |= dict.fromkeys(numbers, "i32")
    constants: dict[str, dict[str, Any]] = {
        "_place": {"STREAMS": 6, "TABLE": True, "ADD": True, "SOURCES": True, "R": 1, "C": 1024},
        "_sum": {"STREAMS": 6, "PARTS": True, "ENTRIES": True, "C": 1024},
    }
    for name, given in constants.items():
        kernel = getattr(row_kernels, name)
        names = kernel.arg_names
        aligned = [n for n in names if types.get(n, "").startswith("*") or n == "width"]
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in given else types[n] for n in names},
            constexprs={(names.index(n),): value for n, value in given.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert made.asm["cubin"]
        assert made.asm["ptx"].count("st.global.v4") >= (6 if name == "_sum" else 1)
        assert made.asm["ptx"].count(".v4.b32 {") >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_on_a_gpu(dtype: torch.dtype) -> None:
    """Equal to torch's on the CPU, without a wait, in one launch and in three."""
    pytest.importorskip("triton")
    from megatron.core.models.mimo.alignment import with_row_index
    from megatron.core.models.mimo.alignment.kernel_trial import why_no_kernels
    from megatron.core.models.mimo.model.merging.merge_by_kernels import merge_from_table

    device = torch.device("cuda", 0)
    assert why_no_kernels(device, dtype) is None
    for kind in ("samples", "packed", "text", "media"):
        for name, plan in plans(batch(kind)).items():
            generator = torch.Generator().manual_seed(10)
            shapes = {"text": WORDS, **plan.counts}
            leaves = {
                key: torch.randn(count, 1100, generator=generator).to(device, dtype)
                for key, count in shapes.items()
                if count
            }
            grad_SBH = torch.randn(plan.sequence_length, plan.batch_size, 1100, device=device)
            grad_SBH = grad_SBH.to(dtype)
            there = with_row_index(plan).to(device)
            for _ in range(2):  # the first compiles
                given = {key: one.clone().requires_grad_() for key, one in leaves.items()}
                media = {key: one for key, one in given.items() if key != "text"}
                kept: list[Tensor] = []
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    kept.append(merge_from_table(given["text"], there, media))
                    kept[0].backward(grad_SBH)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            host_rows = {key: one.detach().cpu() for key, one in given.items()}
            check_on_host(plan, host_rows, kept[0], grad_SBH, given)
            if name == "whole":
                count_launches(given, there, grad_SBH)


def count_launches(given: dict[str, Tensor], plan: Any, grad_SBH: Tensor) -> None:
    """One forward; backward one for zeros, two for sums, and those that add up gradients."""
    from benchmarks.device import launches
    from megatron.core.models.mimo.model.merging.merge_by_kernels import merge_from_table

    media = {key: one for key, one in given.items() if key != "text"}
    merged: list[Tensor] = []
    forward = launches(lambda: merged.append(merge_from_table(given["text"], plan, media)))
    backward = launches(lambda: merged[0].backward(grad_SBH))
    if forward is None or backward is None:
        pytest.skip("the profiler sees no kernels here")
    assert forward == 1
    assert backward <= 3 + len(given)


def check_on_host(
    plan: Any,
    rows: dict[str, Tensor],
    found_SBH: Tensor,
    grad_SBH: Tensor,
    given: dict[str, Tensor],
) -> None:
    from megatron.core.models.mimo.alignment import place_rows, take_rows

    expected_SBH = torch.empty(found_SBH.shape, dtype=found_SBH.dtype)
    place_rows(expected_SBH, plan.streams["text"], rows["text"][plan.text_ids_N])
    for name in plan.counts:
        if name in rows:
            place_rows(expected_SBH, plan.streams[name], rows[name])
            found = given[name].grad
            assert found is not None
            taken_NH = take_rows(grad_SBH.cpu(), plan.streams[name], len(rows[name]))
            assert torch.equal(found.cpu(), taken_NH)
    assert torch.equal(found_SBH.cpu(), expected_SBH)
    places_N = plan.streams["text"].rows_N
    sums_VH = torch.zeros(rows["text"].shape, dtype=torch.float64)
    sums_VH.index_add_(0, plan.text_ids_N, grad_SBH.cpu().double().flatten(0, 1)[places_N])
    found = given["text"].grad
    assert found is not None
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    torch.testing.assert_close(found.cpu().double(), sums_VH, rtol=rtol, atol=rtol)
