"""What parallelism costs: this project against megatron-core, on CPU.

    python benchmarks/parallel.py                      # a table
    python benchmarks/parallel.py --json               # one JSON object
    python benchmarks/parallel.py --context-parallel   # also memory against S (minutes)

Attention: the core attention of a layer against megatron-core's local ``DotProductAttention`` on
the same tensors, causal, forward and backward, checked to be equal before anything is timed. Times
are medians of interleaved repetitions on one thread; memory is what is in use at the peak of
forward and backward beyond the inputs, by the kernel's high-water mark.

Embedding path and encoders under sharding: see ``sharding.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from alignment import median_ms, peak_extra_bytes, start_megatron
from sharding import add_arguments, compare_sharding
from torch import Tensor


def attention_module(module: type, args: argparse.Namespace, *, cp: int = 1, **kw: Any) -> Any:
    """A core attention of ``module``'s class, as a layer spec builds it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.heads * args.head_size,
        num_attention_heads=args.heads,
        num_query_groups=args.key_heads,
        attention_dropout=kw.pop("dropout", 0.0),
        context_parallel_size=cp,
        masked_softmax_fusion=False,
        **kw,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    return module(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def attention_inputs(S: int, args: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values [S, B, heads, D], and the gradient of the output."""
    torch.manual_seed(0)
    heads = (args.heads, args.key_heads, args.key_heads)
    leaves = [
        torch.randn(S, args.batch, count, args.head_size, requires_grad=True) for count in heads
    ]
    return leaves, torch.randn(S, args.batch, args.heads * args.head_size)


def forward_backward(module: Any, leaves: list[Tensor], gradient: Tensor) -> Callable[[], Tensor]:
    """A function that runs both and returns the output."""

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out: Tensor = module(*leaves, None)
        out.backward(gradient)
        return out.detach()

    return run


def compare_attention(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of both, without and with dropout on the weights."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.mimo.layers import CoreAttention

    leaves, gradient = attention_inputs(args.sequence, args)
    result: dict[str, Any] = {}
    for prefix, dropout in (("attention", 0.0), ("attention_dropout", 0.1)):
        runs = {
            name: forward_backward(attention_module(kind, args, dropout=dropout), leaves, gradient)
            for name, kind in (("stock", DotProductAttention), ("ours", CoreAttention))
        }
        if dropout == 0:
            check_equal(runs, leaves)
        times = median_ms(runs, args.repeats)
        peaks = {}
        for name, run in runs.items():
            for leaf in leaves:
                leaf.grad = None
            # Stock keeps its scores between calls: they are part of what it needs.
            parallel_state.get_global_memory_buffer().buffer.clear()
            peaks[name] = peak_extra_bytes(fresh(run, leaves))
        result |= {
            f"{prefix}_speedup": times["stock"] / times["ours"],
            f"{prefix}_memory_ratio": None
            if peaks["ours"] is None or peaks["stock"] is None
            else peaks["ours"] / peaks["stock"],
            f"{prefix}_ms": times["ours"],
            f"stock_{prefix}_ms": times["stock"],
            f"{prefix}_peak_bytes": peaks["ours"],
            f"stock_{prefix}_peak_bytes": peaks["stock"],
        }
    return result


def fresh(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """``run`` from and to a state without gradients and without stock's buffer."""
    from megatron.core import parallel_state

    def call() -> Tensor:
        out = run()
        for leaf in leaves:
            leaf.grad = None
        parallel_state.get_global_memory_buffer().buffer.clear()
        return out

    return call


def check_equal(runs: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> None:
    """Refuse to time two sides that do not compute the same."""
    results = []
    for run in runs.values():
        out = run()
        results.append([out, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)])
    for theirs, ours in zip(*results, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        if not error < 1e-5:
            raise SystemExit(f"the two attentions differ: relative error {error:.1e}")


def peak_of_rank(rank: int, path: str, S: int, args: argparse.Namespace) -> None:
    """One of two context-parallel ranks: writes the peak bytes of its half of a sequence."""
    from megatron.core import parallel_state
    from megatron.mimo.backend import select_backend
    from megatron.mimo.layers import CoreAttention

    torch.set_num_threads(1)
    select_backend("cpu")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    module = attention_module(CoreAttention, args, cp=2)
    leaves, gradient = attention_inputs(S // 2, args)
    run = forward_backward(module, leaves, gradient)
    run()  # connections and buffers that stay

    peak = peak_extra_bytes(fresh(run, leaves))
    if rank == 0:
        with open(f"{path}.peak", "w") as file:
            json.dump(peak, file)
    dist.barrier()
    dist.destroy_process_group()


def context_parallel_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes per token of one of two ranks, forward and backward, against the length.

    One head; megatron-core's on one rank beside it for the lengths that it can take.
    """
    import torch.multiprocessing as processes

    from megatron.core.transformer.dot_product_attention import DotProductAttention

    args = argparse.Namespace(**{**vars(args), "heads": 1, "key_heads": 1})
    per_token, stock = {}, {}
    for S in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "store")
            processes.spawn(peak_of_rank, (path, S, args), nprocs=2)
            with open(f"{path}.peak") as file:
                peak = json.load(file)
        per_token[S] = None if peak is None else peak / (S // 2)
        if args.stock_up_to >= S:
            leaves, gradient = attention_inputs(S, args)
            run = forward_backward(attention_module(DotProductAttention, args), leaves, gradient)
            peak = peak_extra_bytes(fresh(run, leaves))
            stock[S] = None if peak is None else peak / S
    first, last = (per_token[S] for S in (args.lengths[0], args.lengths[-1]))
    return {
        "context_parallel_peak_bytes_per_token": per_token,
        "stock_peak_bytes_per_token": stock,
        "context_parallel_growth": None if not first or last is None else last / first,
    }


def main() -> None:
    """Run the parts that were asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--context-parallel", action="store_true", help="also memory against S on two ranks"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--stock-up-to", type=int, default=8192, help="of those, for stock")
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_megatron()
    result = compare_attention(args) | compare_sharding(args)
    if args.context_parallel:
        result |= context_parallel_memory(args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"  {name:40s} {value if isinstance(value, dict | None) else f'{value:14.3f}'}")


if __name__ == "__main__":
    main()
