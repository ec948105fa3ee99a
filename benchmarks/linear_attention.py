"""The gated delta rule against length: time and memory beside full attention and the recurrence.

    python benchmarks/linear_attention.py --json                 # CPU, one thread, fp32
    python benchmarks/linear_attention.py --json --device cuda   # bf16, with flash-linear-attention

Forward alone, and forward and backward, of the rule in chunks, of PyTorch's fused causal attention
with as many heads of the same size, and of the recurrence token by token. The recurrence is linear
in length and keeps a state for every token: on both passes it is run up to ``--recurrence-tokens``
and its figure for a longer row is that of each token times the tokens, marked "from". On a CPU,
time is that of the process, which other programs on the machine change little. Memory is what is in
use at the highest point beyond the inputs, their gradients and the output. Before anything is
timed, the ways to compute the rule are checked to be equal.

Legend: B rows, T tokens, G key heads, R value heads of each, K size of a key, V size of a value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peak_memory import peak_bytes, reset_peak

Way = Callable[..., Tensor]
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def make_inputs(tokens: int, args: argparse.Namespace) -> list[Tensor]:
    """Queries, keys, values, decays and strengths of one row."""
    generator = torch.Generator().manual_seed(1)
    G, R, D = args.key_heads, args.value_heads // args.key_heads, args.head_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, G, *shape, generator=generator)

    q, k, v = (x.to(args.dtype) for x in (draw(D), draw(D), draw(R, D)))
    decay, strength = -0.1 * draw(R).sigmoid(), draw(R).sigmoid()
    return [x.to(args.device).requires_grad_() for x in (q, k, v, decay, strength)]


def chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor) -> Tensor:
    """This project's rule, in PyTorch."""
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule

    return gated_delta_rule(q, k, v, decay, strength)[0]


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor) -> Tensor:
    """The definition, token by token."""
    from megatron.mimo.layers.gated_delta_net.delta_rule import unit_length

    dtype = v.dtype
    q, k = unit_length(q.float())[:, :, :, None], unit_length(k.float())[:, :, :, None]
    v, retained = v.float(), decay.exp()[..., None, None]
    state = v.new_zeros(*v.shape[:1], *v.shape[2:4], k.size(-1), v.size(-1))
    outputs = []
    for t in range(v.size(1)):
        state = retained[:, t] * state
        held = (state * k[:, t].unsqueeze(-1)).sum(-2)
        correction = strength[:, t].unsqueeze(-1) * (v[:, t] - held)
        state = state + k[:, t].unsqueeze(-1) * correction.unsqueeze(-2)
        outputs.append((state * q[:, t].unsqueeze(-1)).sum(-2))
    return (torch.stack(outputs, dim=1) * q.size(-1) ** -0.5).to(dtype)


def by_fla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor) -> Tensor:
    """flash-linear-attention's kernels, as the layer calls them."""
    from megatron.mimo.layers.gated_delta_net.fla_kernels import FlaKernels

    return FlaKernels().delta_rule(q, k, v, decay, strength, None)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor) -> Tensor:  # noqa: ARG001 (it has no gates)
    """Full causal attention with a query head for each value head, and the rule's keys."""
    R = v.size(3)
    heads = (q.repeat_interleave(R, dim=2), k.repeat_interleave(R, dim=2), v.flatten(2, 3))
    q, k, v = (x.transpose(1, 2) for x in heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def passes(way: Way, inputs: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Forward without a gradient, and forward with backward, as functions."""

    def forward() -> Tensor:
        with torch.no_grad():
            return way(*inputs)

    def both() -> Tensor:
        for one in inputs:
            one.grad = None
        out = way(*inputs)
        out.sum().backward()
        return out.detach()

    return {"forward": forward, "both": both}


def measure(function: Callable[[], Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds and megabytes of a call."""
    if args.device == "cuda":
        from device import device_and_host_ms, peak_extra_bytes

        times = device_and_host_ms({"": function}, rounds=args.repeats, calls=2)[""]
        return {"ms": round(times[0], 3), "mb": round(peak_extra_bytes(function) / 1e6, 1)}
    spent, extra = zip(*(on_host(function) for _ in range(args.repeats)), strict=True)
    return {
        "ms": round(statistics.median(spent) * 1e3, 1),
        "mb": round(statistics.median(extra) / 1e6, 1),
    }


def on_host(function: Callable[[], Tensor]) -> tuple[float, int]:
    """Seconds of the process for one call, and the bytes of the kernel's mark beyond its result."""
    before, start = reset_peak(), time.process_time()
    result = function()
    return time.process_time() - start, peak_bytes() - before - result.nbytes


def compare(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """All ways on one length, with how many times faster the chunks are than the others."""
    inputs = make_inputs(tokens, args)
    ways: dict[str, Way] = {"chunked": chunked, "attention": attention}
    if args.fla:
        ways["fla"] = by_fla
    report: dict[str, Any] = {"tokens": tokens}
    for name, way in ways.items():
        report[name] = {
            title: measure(function, args) for title, function in passes(way, inputs).items()
        }
    few = min(tokens, args.recurrence_tokens)
    short = [one.detach()[:, :few].clone().requires_grad_() for one in inputs]
    report["recurrence"] = {}
    for title, function in passes(recurrence, short).items():
        found = measure(function, args)
        scaled = {name: round(number * tokens / few, 1) for name, number in found.items()}
        report["recurrence"][title] = scaled if few == tokens else {**scaled, "from": few}
    report["times_faster"] = {
        name: {
            title: round(report[name][title]["ms"] / report["chunked"][title]["ms"], 2)
            for title in ("forward", "both")
        }
        for name in report
        if name not in ("tokens", "chunked")
    }
    return report


def largest_difference(args: argparse.Namespace) -> dict[str, float]:
    """Of outputs and gradients of 300 tokens, relative to the recurrence's."""
    inputs = make_inputs(300, args)
    found = {}
    for way in (recurrence, chunked, *([by_fla] if args.fla else [])):
        out = passes(way, inputs)["both"]()
        found[way.__name__] = [out, *(one.grad for one in inputs if one.grad is not None)]
    expected = found.pop("recurrence")
    return {
        name: max(
            ((one.float() - other.float()).norm() / other.float().norm()).item()
            for one, other in zip(tensors, expected, strict=True)
        )
        for name, tensors in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--value-heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--recurrence-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    from megatron.mimo.backend import select_backend

    select_backend(args.device)
    print_report(run(args), as_json=args.json)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    from megatron.mimo.layers.gated_delta_net.fla_kernels import is_usable

    torch.set_num_threads(1)
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.fla = args.device == "cuda" and is_usable()
    shown = {name: str(value) for name, value in vars(args).items() if name != "json"}
    return {
        "settings": shown,
        "relative_difference": largest_difference(args),
        "lengths": [compare(tokens, args) for tokens in args.lengths],
    }


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """One line of JSON, or a table of milliseconds and megabytes."""
    if as_json:
        print(json.dumps(report))
        return
    print(f"relative difference to the recurrence: {report['relative_difference']}")
    for row in report["lengths"]:
        print(f"{row['tokens']:>6}   chunked {row['chunked']}")
        for name, times in row["times_faster"].items():
            print(f"{'':>9}{name} {row[name]}, times slower {times}")


if __name__ == "__main__":
    main()
