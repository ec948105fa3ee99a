"""What the CPU backend costs per operation: ``python benchmarks/cpu_backend.py [--json]``.

Each operation is timed as a line of code inside a ``megatron.*`` module would run it, once with
``torch`` and once with the ``torch`` that such modules see under the CPU backend, in turns in one
process, on one thread. Tensors are small (4 x 8 floats) so that the cost per call shows; ``layer``
is a realistic amount of work (one MLP block on 64 x 4 x 128 floats, forward and backward). For
comparison, the last column runs the same line under a ``TorchFunctionMode`` that rewrites
``device="cuda"``, the usual way to get by without CUDA.

Percentages are medians of the ratios of neighbouring rounds; on a busy machine they scatter by
about 1 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron.mimo.backend import select_backend

_TINY = "a = torch.ones(4, 8)\nb = torch.ones(8, 8)\nw = torch.ones(8)\n"
_BLOCK = """
x = torch.randn(64, 4, 128)
w1 = torch.randn(512, 128, requires_grad=True)
w2 = torch.randn(128, 512, requires_grad=True)
n = torch.ones(128, requires_grad=True)
"""
_LINES = {
    "add": (_TINY, "torch.add(a, a)"),
    "matmul": (_TINY, "torch.matmul(a, b)"),
    "softmax": (_TINY, "torch.nn.functional.softmax(a, dim=-1)"),
    "layer_norm": (_TINY, "torch.nn.functional.layer_norm(a, (8,), w)"),
    "zeros": (_TINY, "torch.zeros(4, 8)"),
    "zeros_on_device": (_TINY, "torch.zeros(4, 8, device='cpu')"),
    "layer": (
        _BLOCK,
        "h = torch.nn.functional.layer_norm(x, (128,), n); "
        "h = torch.nn.functional.gelu(torch.matmul(h, w1.t())); "
        "h = torch.nn.functional.dropout(torch.matmul(h, w2.t()), 0.1) + x; "
        "torch.sum(h).backward()",
    ),
}


class _CudaToCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` of every call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _loop(name: str, torch_of_module: Any) -> Callable[[int], float]:
    """A function of a repeat count that returns seconds per execution of the line ``name``."""
    setup, line = _LINES[name]
    scope: dict[str, Any] = {"torch": torch_of_module, "perf_counter": time.perf_counter}
    code = (
        f"{setup}\ndef loop(count):\n    start = perf_counter()\n    for _ in range(count):\n"
        f"        {line}\n    return (perf_counter() - start) / count\n"
    )
    exec(code, scope)
    loop: Callable[[int], float] = scope["loop"]
    return loop


def _under_mode(loop: Callable[[int], float]) -> Callable[[int], float]:
    def run(count: int) -> float:
        with _CudaToCpu():
            return loop(count)

    return run


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median microseconds per call of one line, without and with the backend, and overheads."""
    import megatron.core.utils

    loops = {
        "without": _loop(name, torch),
        "with": _loop(name, vars(megatron.core.utils)["torch"]),
        "function_mode": _under_mode(_loop(name, torch)),
    }
    count = max(1, int(2e-3 / loops["without"](20)))
    times: dict[str, list[float]] = {key: [] for key in loops}
    for index in range(rounds):
        order = list(loops) if index % 2 else list(reversed(loops))
        for key in order:
            times[key].append(loops[key](count))
    median = {key: statistics.median(values) for key, values in times.items()}
    return {
        "without_us": round(median["without"] * 1e6, 4),
        "with_us": round(median["with"] * 1e6, 4),
        "overhead_percent": _overhead(times["with"], times["without"]),
        "function_mode_overhead_percent": _overhead(times["function_mode"], times["without"]),
    }


def _overhead(times: list[float], baseline: list[float]) -> float:
    ratios = [time / base for time, base in zip(times, baseline, strict=True)]
    return round(100 * (statistics.median(ratios) - 1), 2)


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=200, help="rounds per operation")
    arguments = parser.parse_args()
    select_backend("cpu")
    torch.set_num_threads(1)
    gc.disable()
    operations = {name: measure(name, arguments.rounds) for name in _LINES}
    if arguments.json:
        report = {
            "layer_overhead_percent": operations["layer"]["overhead_percent"],
            "operations": operations,
            "torch": torch.__version__,
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    sys.stdout.write(f"{'operation':<16}{'torch us':>10}{'backend us':>12}{'%':>8}{'mode %':>9}\n")
    for name, row in operations.items():
        sys.stdout.write(
            f"{name:<16}{row['without_us']:>10.3f}{row['with_us']:>12.3f}"
            f"{row['overhead_percent']:>8.1f}{row['function_mode_overhead_percent']:>9.1f}\n"
        )


if __name__ == "__main__":
    main()
