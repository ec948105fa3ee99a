"""Merging text and modality rows: this project against megatron-core's MIMO, in one run.

    python benchmarks/alignment.py            # a table
    python benchmarks/alignment.py --json     # one JSON object
    python benchmarks/alignment.py --device cpu

Both sides get the same tensors and share one language model. What is timed is the way from
``input_ids`` and encoder rows to the decoder's input [S, B, H], text lookup included, and its
backward pass. Times are medians of interleaved repetitions on one thread, in milliseconds.

On a GPU, the default where there is one, the tensors are bf16 and larger, and ``device`` times,
those of the GPU that does not wait for the host, are told from ``host`` times. ``--row-kernels
torch`` measures this project's way without Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import device as on_device
from benchmarks.peak_memory import RESETS, peak_bytes, reset_peak
from megatron.mimo.backend import select_backend
from megatron.mimo.backend.host_sync import HostSyncCounter
from megatron.mimo.backend.job import end_job

IMAGE, AUDIO = 32766, 32767
LIBRARY = "megatron.core.models.mimo"


@dataclass(kw_only=True)
class Case:
    """One micro-batch: rows [N, H] per modality beside ``input_ids`` [B, S]."""

    input_ids_BS: torch.Tensor
    special_token_ids: dict[str, int]
    rows: dict[str, torch.Tensor]
    grad_SBH: torch.Tensor


def make_case(spans: dict[str, tuple[int, int, int]], args: argparse.Namespace) -> Case:
    """Token ids with ``spans = {modality: (token id, spans per sample, span length)}``."""
    how: dict[str, Any] = {"device": args.device, "dtype": args.dtype}
    ids_BS = torch.randint(0, IMAGE, (args.batch, args.sequence))
    total = sum(count for _, count, _ in spans.values())
    slots = [int(slot) for slot in torch.linspace(16, args.sequence, total + 1)[:-1]]
    order = [(token, length) for token, count, length in spans.values() for _ in range(count)]
    for slot, (token, length) in zip(slots, order, strict=True):
        ids_BS[:, slot : slot + length] = token
    tokens = {name: token for name, (token, _, _) in spans.items()}
    rows = {
        name: torch.randn(int((ids_BS == token).sum()), args.hidden, requires_grad=True, **how)
        for name, token in tokens.items()
    }
    return Case(
        input_ids_BS=ids_BS.to(args.device),
        special_token_ids=tokens,
        rows=rows,
        grad_SBH=torch.randn(args.sequence, args.batch, args.hidden, **how),
    )


def import_library(*, stock: bool) -> Any:
    """The MIMO package, megatron-core's or ours, with the other put out of the way."""
    os.environ["MEGATRON_MIMO_OVERLAY"] = "0" if stock else "1"
    for name in [name for name in sys.modules if name.startswith(LIBRARY)]:
        del sys.modules[name]
    library = importlib.import_module(LIBRARY)
    models = importlib.import_module("megatron.core.models")
    models.mimo = library  # "import megatron.core.models.mimo" reads the attribute
    return library


def build_model(library: Any, language_model: Any, case: Case) -> Any:
    """A MimoModel of ``library`` around ``language_model`` (built by the spec when None)."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    specs = {
        name: ModuleSpec(
            module=library.VisionModalitySubmodules,
            submodules={"encoders": {"rows": ModuleSpec(module=torch.nn.Identity)}},
        )
        for name in case.special_token_ids
    }
    config = library.MimoModelConfig(language_model, specs, dict(case.special_token_ids))
    return library.MimoModel(config)


def language_spec(args: argparse.Namespace) -> Any:
    """A GPT of one layer: only its embedding takes part."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        ffn_hidden_size=8,
        num_attention_heads=8,
        use_cpu_initialization=args.device == "cpu",
        hidden_dropout=0.0,
        params_dtype=args.dtype,
        bf16=args.dtype == torch.bfloat16,
    )
    params = {
        "config": config,
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": args.vocabulary,
        "max_sequence_length": args.sequence,
        "position_embedding_type": "rope",
    }
    return ModuleSpec(module=GPTModel, params=params)


def start_megatron(device: str) -> None:
    """One process, Megatron's groups, the CPU backend where it is asked for."""
    import torch.distributed as dist

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = dist.HashStore()
    backend = {"cpu": "gloo", "cuda": "nccl"}[select_backend(device)]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def median_ms(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each function, interleaved so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra_bytes(function: Callable[[], torch.Tensor], rounds: int = 3) -> int | None:
    """Bytes in use at the peak of ``function`` beyond its result; None off Linux.

    Read from the kernel's high-water mark of resident memory, so that every allocator counts.
    """
    if not RESETS:
        return None
    extra = []
    for _ in range(rounds):
        before = reset_peak()
        result = function()
        extra.append(peak_bytes() - before - result.nbytes)
        del result
    return statistics.median(extra)


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Both libraries on one case."""
    spec = language_spec(args)
    stock = build_model(import_library(stock=True), spec, case).to(args.device)
    ours = build_model(import_library(stock=False), spec, case).to(args.device)
    ours.language_model = stock.language_model
    alignment = importlib.import_module(f"{LIBRARY}.alignment")
    merge = importlib.import_module(f"{LIBRARY}.model.merging.merge")
    embedding = ours.language_model.embedding
    from megatron.mimo.data.micro_batches.broadcast import move

    ids_on_host_BS = case.input_ids_BS.cpu()

    def make_plan() -> Any:
        plan = alignment.build_alignment_plan(
            ids_on_host_BS, case.special_token_ids, vocab_size=args.vocabulary
        )
        return alignment.with_row_index(plan) if args.row_kernels == "triton" else plan

    plan = move(make_plan(), torch.device(args.device))

    def run_stock() -> torch.Tensor:
        text = stock.get_text_embeddings(case.input_ids_BS, None, case.special_token_ids)
        return stock.align_embeddings_by_token_positions(
            {**case.rows, "text": text}, case.input_ids_BS, case.special_token_ids
        )

    def run_ours(plan: Any = plan) -> torch.Tensor:
        embedded: torch.Tensor = merge.embed_streams(embedding, plan, case.rows, None)
        return embedded

    leaves = [stock.language_model.embedding.word_embeddings.weight, *case.rows.values()]
    check_equal(run_stock, run_ours, leaves, case)
    how = measure if args.device == "cpu" else measure_on_device
    return how(case, leaves, args.repeats, run_stock, run_ours, make_plan)


def measure(
    case: Case,
    leaves: list[torch.Tensor],
    repeats: int,
    run_stock: Callable[[], torch.Tensor],
    run_ours: Callable[..., torch.Tensor],
    make_plan: Callable[[], Any],
) -> dict[str, Any]:
    """Times, host synchronisations and memory of both sides."""

    def with_backward(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: run_both(forward, leaves, case)

    forward = median_ms(
        {
            "stock": run_stock,
            "ours": run_ours,
            "ours_without_plan": lambda: run_ours(make_plan()),
            "plan": make_plan,
            "copy": case.grad_SBH.clone,
        },
        repeats,
    )
    both = median_ms({"stock": with_backward(run_stock), "ours": with_backward(run_ours)}, repeats)
    syncs = {
        name: count_syncs(run, case) for name, run in (("stock", run_stock), ("ours", run_ours))
    }
    return {
        "forward_speedup": forward["stock"] / forward["ours"],
        "forward_speedup_without_plan": forward["stock"] / forward["ours_without_plan"],
        "forward_backward_speedup": both["stock"] / both["ours"],
        "host_syncs_forward": syncs["ours"][0],
        "host_syncs_backward": syncs["ours"][1],
        "stock_host_syncs_forward": syncs["stock"][0],
        "stock_host_syncs_backward": syncs["stock"][1],
        "peak_extra_bytes_forward": peak_extra_bytes(run_ours),
        "stock_peak_extra_bytes_forward": peak_extra_bytes(run_stock),
        "forward_ms": forward["ours"],
        "stock_forward_ms": forward["stock"],
        "forward_backward_ms": both["ours"],
        "stock_forward_backward_ms": both["stock"],
        "plan_ms": forward["plan"],
        "copy_ms": forward["copy"],
        "forward_over_copy": forward["ours"] / forward["copy"],
        "modality_share": modality_share(case),
    }


def modality_share(case: Case) -> float:
    """Tokens that take a row, of all tokens."""
    return sum(rows.size(0) for rows in case.rows.values()) / case.input_ids_BS.numel()


def run_both(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], case: Case) -> None:
    """Forward and backward, into fresh gradients."""
    for leaf in leaves:
        leaf.grad = None
    forward().backward(case.grad_SBH)


def measure_on_device(
    case: Case,
    leaves: list[torch.Tensor],
    repeats: int,
    run_stock: Callable[[], torch.Tensor],
    run_ours: Callable[..., torch.Tensor],
    make_plan: Callable[[], Any],
) -> dict[str, Any]:
    """The same on a GPU, whose time is told from that of the host."""
    runs: dict[str, Callable[[], torch.Tensor]] = {"ours": run_ours, "stock": run_stock}
    forward = on_device.device_and_host_ms({**runs, "copy": case.grad_SBH.clone}, rounds=repeats)
    both = on_device.device_and_host_ms(
        {name: partial(run_both, run, leaves, case) for name, run in runs.items()}, rounds=repeats
    )
    result: dict[str, Any] = {
        "forward_speedup": forward["stock"][0] / forward["ours"][0],
        "forward_backward_speedup": both["stock"][0] / both["ours"][0],
        "forward_over_copy": forward["ours"][0] / forward["copy"][0],
        "forward_backward_over_copy": both["ours"][0] / forward["copy"][0],
        "copy_device_ms": forward["copy"][0],
        "plan_ms": median_ms({"plan": make_plan}, repeats)["plan"],
        "modality_share": modality_share(case),
    }
    for name, run in runs.items():
        prefix = "" if name == "ours" else f"{name}_"
        kept: list[torch.Tensor] = []
        waits = on_device.host_waits(lambda run=run, kept=kept: kept.append(run()))
        backward = on_device.host_waits(lambda kept=kept: kept.pop().backward(case.grad_SBH))
        for passes, times in (("forward", forward), ("forward_backward", both)):
            device_ms, host_ms = times[name]
            result[f"{prefix}{passes}_device_ms"] = device_ms
            result[f"{prefix}{passes}_host_ms"] = host_ms
        result[f"{prefix}forward_busy_ms"] = on_device.busy_ms(run)
        result[f"{prefix}forward_launches"] = on_device.launches(run)
        result[f"{prefix}forward_backward_launches"] = on_device.launches(
            partial(run_both, run, leaves, case)
        )
        result[f"{prefix}host_syncs_forward"] = len(waits)
        result[f"{prefix}host_syncs_backward"] = len(backward)
        result[f"{prefix}peak_extra_bytes_forward"] = on_device.peak_extra_bytes(run)
    return result


def check_equal(
    run_stock: Callable[[], torch.Tensor],
    run_ours: Callable[[], torch.Tensor],
    leaves: list[torch.Tensor],
    case: Case,
) -> None:
    """Refuse to time two sides that do not compute the same."""
    results = []
    for run in (run_stock, run_ours):
        for leaf in leaves:
            leaf.grad = None
        merged_SBH = run()
        merged_SBH.backward(case.grad_SBH)
        results.append([merged_SBH.detach(), *(leaf.grad.clone() for leaf in leaves)])
    names = ["merged", "gradient of the word table", *case.rows]
    for name, theirs, ours in zip(names, *results, strict=True):
        if name == names[1] and ours.dtype == torch.bfloat16:
            # a word's rows are summed in an order of each side's own
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error < 1e-2, f"{name}: relative error {error:.1e}"
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=f"{name} differs")


def count_syncs(forward: Callable[[], torch.Tensor], case: Case) -> tuple[int, int]:
    """Host synchronisations of the forward and of the backward pass."""
    with HostSyncCounter() as counter:
        merged_SBH = forward()
        in_forward = counter.total
        merged_SBH.backward(case.grad_SBH)
    return in_forward, counter.total - in_forward


def main() -> None:
    """Run both cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, help="default: 2048, on a GPU 4096")
    parser.add_argument("--hidden", type=int, help="default: 1024, on a GPU 4096")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument(
        "--row-kernels",
        choices=("triton", "torch"),
        help="what places rows: default: triton on a GPU (on the CPU it is torch in any case)",
    )
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = args.device == "cpu"
    args.row_kernels = args.row_kernels or ("torch" if on_cpu else "triton")
    args.dtype = torch.float32 if on_cpu else torch.bfloat16
    args.sequence = args.sequence or (2048 if on_cpu else 4096)
    args.hidden = args.hidden or (1024 if on_cpu else 4096)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start_megatron(args.device)
    length = args.sequence * 9 // 32  # two spans: 56.25 % of the sequence
    images = make_case({"images": (IMAGE, 2, length)}, args)
    two = make_case({"images": (IMAGE, 2, length // 2), "audio": (AUDIO, 2, length // 2)}, args)
    result = {**compare(images, args), "two_modalities": compare(two, args), "device": args.device}
    end_job()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for title, figures in (("one modality", result), ("two modalities", result["two_modalities"])):
        print(title)
        for name, value in figures.items():
            if isinstance(value, int | float):
                print(f"  {name:34s} {value:14.3f}")


if __name__ == "__main__":
    main()
