"""What is said of a trace, from events whose sums are known."""

from __future__ import annotations

from megatron.mimo.training.profile_summary import Event, summarize

MS = 1_000_000


def step(number: int, start: int, end: int) -> Event:
    return Event(name=f"ProfilerStep#{number}", start=start * MS, end=end * MS, is_range=True)


def part(name: str, start: int, end: int) -> Event:
    return Event(name=name, start=start * MS, end=end * MS, is_range=True)


def launch(at: int, correlation: int, name: str = "cudaLaunchKernel", thread: int = 1) -> Event:
    start = at * MS
    return Event(name=name, start=start, end=start + MS, thread=thread, correlation=correlation)


def kernel(name: str, start: int, end: int, correlation: int) -> Event:
    return Event(name=name, start=start * MS, end=end * MS, on_device=True, correlation=correlation)


def test_a_device() -> None:
    """Kernels of two streams overlap, one runs after the range that launched it."""
    summary = summarize(
        [
            *(step(3, 0, 50), step(4, 50, 100), part("nccl:all_reduce", 2, 90)),
            *(part("encode images", 0, 10), part("backward", 40, 60)),
            Event(name="backward", start=0, end=100 * MS, on_device=True, is_range=True),
            kernel("Stream Sync", 0, 100, 0),
            *(launch(1, 7), launch(45, 8, thread=2), launch(46, 9, "cudaMemcpyAsync", 2)),
            *(launch(70, 0, "cudaStreamSynchronize"), launch(71, 0, "cudaEventSynchronize")),
            *(launch(3, 1, "aten::mm"), launch(101, 0, "cudaDeviceSynchronize")),
            *(kernel("gemm", 12, 32, 7), kernel("gemm", 50, 70, 8)),
            kernel("Memcpy HtoD", 60, 80, 9),
        ]
    )
    assert summary is not None
    assert (summary.steps, summary.wall) == (2, 100 * MS)
    assert summary.busy == 50 * MS  # 12-32 and 50-80
    assert (summary.launches, summary.copies) == (2, 1)
    assert summary.waits == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 1}
    assert summary.host == {"encode images": 10 * MS, "backward": 20 * MS}
    assert summary.device == {"encode images": 20 * MS, "backward": 40 * MS}
    assert summary.unranged == 70 * MS
    assert summary.largest == {"gemm": (40 * MS, 2), "Memcpy HtoD": (20 * MS, 1)}
    text = summary.text(title="profile", places={"a.py:3": 4, "b.py:9": 12}, processor="")
    assert text.startswith("profile: 2 steps of 50.00 ms\ndevice busy 50.0 % of the time, 25.00 ms")
    assert text.index("    12  b.py:9") < text.index("     4  a.py:3")
    assert (
        "synchronisations: 1 a step (cudaStreamSynchronize 0.5, cudaEventSynchronize 0.5)" in text
    )


def test_a_processor() -> None:
    """An operator's own time is without what it calls; autograd's nodes are no operators."""

    def op(name: str, start: int, end: int) -> Event:
        return Event(name=name, start=start * MS, end=end * MS, thread=1)

    summary = summarize(
        [
            *(step(1, 0, 40), part("data", 0, 5), op("aten::_local_scalar_dense", 1, 2)),
            op("autograd::engine::evaluate_function: MmBackward0", 10, 40),
            *(op("aten::linear", 10, 30), op("aten::t", 10, 12), op("aten::mm", 12, 25)),
            *(op("aten::mm", 30, 38), op("aten::_local_scalar_dense", 38, 39)),
        ]
    )
    assert summary is not None
    assert summary.busy is None
    assert summary.launches == 4
    assert summary.waits == {"aten::_local_scalar_dense": 1}  # data are on the host anyway
    assert summary.largest["aten::mm"] == (21 * MS, 2)
    assert summary.largest["aten::linear"] == (5 * MS, 1)
    assert "processor busy" in summary.text(title="", places=None, processor="processor busy 9 %")


def test_no_step() -> None:
    assert summarize([part("data", 0, 5)]) is None
