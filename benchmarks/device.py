"""Times, waits and memory of a CUDA device, apart from those of the host that feeds it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "busy_ms",
    "device_and_host_ms",
    "host_waits",
    "launches",
    "matmul_tflops",
    "peak_extra_bytes",
]

_HEAD_START = 100_000_000  # clock cycles, some 50 ms, in which the host queues its kernels
_WAITS = "called a synchronizing CUDA operation"


def device_and_host_ms(
    functions: dict[str, Callable[[], Any]], *, rounds: int, calls: int = 5
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a call on the device and on the host; the functions take turns.

    The device's time is that between two events around some calls, queued while the device is kept
    busy, so that it does not wait for the host, unless the function waits for the device. The
    host's time is that until the call returns.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            host = time.perf_counter() - begin
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)
            start.record()
            for _ in range(calls):
                function()
            end.record()
            torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append((start.elapsed_time(end) / calls, host * 1e3 / calls))
    return {
        name: (
            statistics.median(device for device, _ in pairs),
            statistics.median(host for _, host in pairs),
        )
        for name, pairs in times.items()
    }


def busy_ms(function: Callable[[], Any]) -> float | None:
    """Milliseconds in which the device works for one call; None where it cannot be profiled."""
    spans = _device_spans(function)
    total = until = 0.0
    for start, end in spans:  # kernels of two streams may overlap
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e3 if spans else None


def launches(function: Callable[[], Any]) -> int | None:
    """What the device is given to do in one call; None where it cannot be profiled."""
    return len(_device_spans(function)) or None


def _device_spans(function: Callable[[], Any]) -> list[tuple[float, float]]:
    """Begin and end, in microseconds, of what the device does in one call; [] if unknown."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        return sorted(
            (event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        )
    except RuntimeError:
        return []


def host_waits(function: Callable[[], Any]) -> list[str]:
    """Where the host waits for the device in one call: the text of a line of code for each time."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{'/'.join(one.filename.split('/')[-2:])}:{one.lineno}"
        for one in caught
        if _WAITS in str(one.message)
    ]


def peak_extra_bytes(function: Callable[[], torch.Tensor]) -> int:
    """Bytes in use on the device at the peak of a call, beyond its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes


def matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of a product of two square bf16 matrices: what the device can do at most."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ((device, _),) = device_and_host_ms({"": lambda: a @ b}, rounds=5, calls=repeats).values()
    return 2 * size**3 / device / 1e9
