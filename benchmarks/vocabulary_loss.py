"""The loss over a large vocabulary: whole logits against pieces, time and memory.

    python benchmarks/vocabulary_loss.py --json
    python benchmarks/vocabulary_loss.py --json --tokens 8192 --hidden 64 --repeats 1      # 10 GB
    python benchmarks/vocabulary_loss.py --device cuda --dtype bfloat16 --words 32064 --hidden 2048

Forward and backward of output layer and loss on one process, this project's loss in pieces against
megatron-core's cross-entropy of whole logits, checked to be equal. Memory is what is in use at the
highest point beyond inputs, weight and their gradients, by the kernel's mark or, on a GPU, torch's.
There the products alone are timed as well: three with hidden states and weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from alignment import median_ms, peak_extra_bytes, start_megatron
from torch import Tensor

from benchmarks import device as on_device


def losses(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Both ways; each gives the losses, and adds to the gradients of what it was given."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.mimo.layers.vocabulary_loss import chunked_cross_entropy

    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(1)
    how: dict[str, Any] = {"device": args.device, "dtype": dtype}
    hidden_TH = torch.randn(args.tokens, args.hidden, generator=generator).to(**how)
    weight_VH = 0.02 * torch.randn(args.words, args.hidden, generator=generator).to(**how)
    labels_T = torch.randint(0, args.words, (args.tokens,), generator=generator).to(args.device)
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    hidden_TH.grad, weight_VH.grad = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)
    group = dist.group.WORLD

    def whole() -> Tensor:
        logits_TV = hidden_TH @ weight_VH.t()
        losses_T1 = vocab_parallel_cross_entropy(
            logits_TV.float()[:, None], labels_T[:, None], tp_group=group
        )
        losses_T1.sum().backward()
        return losses_T1.detach()[:, 0]

    def pieces() -> Tensor:
        losses_T = chunked_cross_entropy(hidden_TH, weight_VH, labels_T, first=0, group=group)
        losses_T.sum().backward()
        return losses_T.detach()

    return {"whole": whole, "pieces": pieces}


def products(args: argparse.Namespace) -> Callable[[], None]:
    """The products of matrices that whole logits need, forward and backward."""
    how: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden_TH = torch.randn(args.tokens, args.hidden, **how)
    weight_VH = torch.randn(args.words, args.hidden, **how)

    def run() -> None:
        logits_TV = hidden_TH @ weight_VH.t()
        logits_TV @ weight_VH
        logits_TV.t() @ hidden_TH

    return run


def measure(args: argparse.Namespace, ways: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Time and memory of each way."""
    report: dict[str, Any] = {}
    if args.device == "cuda":
        runs = {**ways, "products": products(args)}
        for name, (device, host) in on_device.device_and_host_ms(runs, rounds=args.repeats).items():
            report[name] = {"ms": round(device, 3), "host_ms": round(host, 3)}
        for name, way in ways.items():
            report[name]["launches"] = on_device.launches(way)
            report[name]["extra_mb"] = round(on_device.peak_extra_bytes(way) / 1e6, 1)
        return report
    times = median_ms(ways, args.repeats)
    for name, way in ways.items():
        extra = peak_extra_bytes(way, rounds=min(args.repeats, 3))
        report[name] = {
            "ms": round(times[name], 1),
            "extra_mb": None if extra is None else round(extra / 1e6, 1),
        }
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--words", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_megatron(args.device)
    ways = losses(args)
    difference = (ways["whole"]() - ways["pieces"]()).abs().max().item()
    report: dict[str, Any] = {**vars(args), "largest_difference": difference}
    report |= measure(args, ways)
    if report["whole"]["extra_mb"]:
        share = report["pieces"]["extra_mb"] / report["whole"]["extra_mb"]
        report["memory_ratio"] = round(share, 4)
    report["time_ratio"] = round(report["pieces"]["ms"] / report["whole"]["ms"], 3)
    dist.destroy_process_group()
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
