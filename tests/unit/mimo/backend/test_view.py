"""Each answer that ``megatron.*`` modules get from their ``torch``, and what torch itself says.

A probe fails on torch (where CUDA is missing) and passes on the view: that is its proof that the
patch is needed and that undoing it would be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.mimo.backend import cpu, select_backend
from megatron.mimo.backend.patch import VIEW

NAMES = [patch.attribute for patch in cpu.PATCHES if patch.module == VIEW]


def _factory(name: str, *arguments: Any) -> Callable[[Any], bool]:
    return lambda t: bool(getattr(t, name)(*arguments, device="cuda").device.type == "cpu")


def _timing(t: Any) -> bool:
    start, end = t.cuda.Event(enable_timing=True), t.cuda.Event(enable_timing=True)
    start.record()
    sum(range(10_000))
    end.record()
    return bool(0 < start.elapsed_time(end) < 1e3)


def _streams(t: Any) -> bool:
    stream = t.cuda.Stream()
    with t.cuda.stream(stream):
        stream.wait_stream(t.cuda.current_stream())
        stream.wait_event(stream.record_event())
    return True


def _seeds_both(t: Any) -> bool:
    def draw(seed: int) -> tuple[float, list[int]]:
        t.manual_seed(seed)
        return torch.rand(()).item(), t.get_rng_state().tolist()

    return draw(3) == draw(3) and draw(3)[1] != draw(4)[1]


def _device_state_is_dropouts(t: Any) -> bool:
    state = t.cuda.get_rng_state()
    first = torch.nn.functional.dropout(torch.ones(64))
    t.cuda.set_rng_state(state)
    return torch.equal(first, torch.nn.functional.dropout(torch.ones(64)))


def _device_seed_reaches_dropout(t: Any) -> bool:
    masks = []
    for seed in (5, 5, 6):
        t.cuda.manual_seed(seed)
        masks.append(torch.nn.functional.dropout(torch.ones(64)))
    return torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def _host_apart_from_device(t: Any) -> bool:
    before = t.get_rng_state()
    torch.nn.functional.dropout(torch.ones(64))
    return torch.equal(before, t.get_rng_state())


def _host_state_is_restored_alone(t: Any) -> bool:
    device_state = torch.default_generator.get_state()
    t.set_rng_state(torch.Generator().manual_seed(17).get_state())
    return torch.equal(device_state, torch.default_generator.get_state())


def _autocast(t: Any) -> bool:
    with t.autocast("cuda", dtype=torch.bfloat16):
        return bool((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16)


def _nvtx(t: Any) -> bool:
    t.cuda.nvtx.range_push("step")
    t.cuda.nvtx.range_pop()
    return True


PROBES: dict[str, Callable[[Any], bool]] = {
    "cuda.is_available": lambda t: t.cuda.is_available(),
    "cuda.device_count": lambda t: t.cuda.device_count() > 0,
    "cuda.current_device": lambda t: torch.empty(1, device=t.cuda.current_device()).is_cpu,
    "cuda.set_device": lambda t: t.cuda.set_device(0) is None,
    "cuda.get_device_capability": lambda t: t.cuda.get_device_capability() == (0, 0),
    "cuda.get_device_properties": lambda t: (
        t.cuda.get_device_properties(t.device("cuda:0")).major == 0
    ),
    "device": lambda t: (
        t.device("cuda:3").type == t.device("cuda", 1).type == "cpu"
        and isinstance(torch.device("cpu"), t.device)
        and t.device("meta").type == "meta"
    ),
    "autocast": _autocast,
    "empty": _factory("empty", 2),
    "empty_like": _factory("empty_like", torch.ones(2)),
    "ones": _factory("ones", 2),
    "rand": _factory("rand", 2),
    "tensor": _factory("tensor", [1.0]),
    "zeros": _factory("zeros", 2),
    "cuda.Stream": _streams,
    "cuda.Event": _timing,
    "cuda.stream": _streams,
    "cuda.current_stream": _streams,
    "cuda.synchronize": lambda t: t.cuda.synchronize() is None,
    "cuda.nvtx.range_push": _nvtx,
    "cuda.nvtx.range_pop": _nvtx,
    "cuda.memory_stats": lambda t: t.cuda.memory_stats()["allocated_bytes.all.current"] == 0,
    "cuda.device_memory_used": lambda t: t.cuda.device_memory_used() == 0,
    "cuda.get_rng_state": _device_state_is_dropouts,
    "cuda.set_rng_state": _device_state_is_dropouts,
    "cuda.random.get_rng_state": lambda t: torch.equal(
        t.cuda.random.get_rng_state(device="cuda"), torch.default_generator.get_state()
    ),
    "cuda.manual_seed": _device_seed_reaches_dropout,
    "cuda.default_generators": lambda t: (
        t.cuda.default_generators[t.cuda.current_device()] is torch.default_generator
    ),
    "get_rng_state": _host_apart_from_device,
    "set_rng_state": _host_state_is_restored_alone,
    "manual_seed": _seeds_both,
}


@pytest.fixture(autouse=True)
def cpu_without_side_effects(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU backend on and the generator's state put back.

    NVTX is as in a torch built without CUDA; stream contexts find device 0, as where one exists.
    """
    select_backend("cpu")
    stub = type("Stub", (), {"rangePushA": _raise, "rangePop": _raise})()
    monkeypatch.setattr(torch.cuda.nvtx, "_nvtx", stub)
    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_, **__: 0)
    with torch.random.fork_rng(devices=[]):
        yield


def _raise(*_: object) -> None:
    raise RuntimeError("NVTX functions not installed")


def _seen_by_megatron() -> Any:
    import megatron.core.utils

    return megatron.core.utils.torch


def test_every_patch_has_a_probe() -> None:
    assert sorted(PROBES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_megatron_gets_an_answer(name: str) -> None:
    assert PROBES[name](_seen_by_megatron())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, torch has answers of its own")
@pytest.mark.parametrize("name", NAMES)
def test_without_the_patch_it_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = _seen_by_megatron()
    *path, attribute = name.split(".")
    stands_in, original = view, torch
    for step in path:
        stands_in, original = getattr(stands_in, step), getattr(original, step)
    monkeypatch.setattr(stands_in, attribute, getattr(original, attribute))
    try:
        answered = PROBES[name](view)
    except (RuntimeError, LookupError, AttributeError, TypeError, ImportError, UserWarning):
        return
    assert not answered


def test_torch_keeps_the_truth() -> None:
    """torch, and whoever imports it outside megatron-core, sees no device that is not there."""
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    assert torch.zeros is not _seen_by_megatron().zeros
    assert torch.cuda is not _seen_by_megatron().cuda
    for name in NAMES:
        owner: Any = torch
        *path, attribute = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        module = getattr(getattr(owner, attribute), "__module__", None)
        assert module is None or not module.startswith("megatron"), name
    if not torch.cuda.is_available():
        assert not torch.accelerator.is_available()
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1, device="cuda")


def test_what_is_not_patched_is_torchs_own() -> None:
    """No operation on tensors gets slower: the view holds the very functions of torch."""
    view = _seen_by_megatron()
    patched = {name.partition(".")[0] for name in NAMES}
    different = {name for name in vars(torch) if getattr(view, name) is not getattr(torch, name)}
    assert different - {"__getattr__"} == patched
    assert view._dynamo is torch._dynamo
    assert view.nn.functional.dropout is torch.nn.functional.dropout
