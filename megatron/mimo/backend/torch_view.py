"""The ``torch`` that ``megatron.*`` modules see on a machine without CUDA.

megatron-core asks ``torch.cuda`` for devices, streams and generators, and allocates with
``device="cuda"``. Its modules get a copy of the ``torch`` namespace in which those questions have
CPU answers; every other name is torch's own object, so that no operation on a tensor costs more.
``torch`` itself, and every other module, keeps the truth about CUDA.

Random numbers: with CUDA there are two generators, the host's and the device's. Here the device's
is ``torch.default_generator`` (the one that dropout on CPU tensors draws from) and the host's is a
generator of its own, which data loading draws from (:func:`host_generator`): a data-parallel rank's
tensor-parallel peers, of which only one loads data, keep equal device generators.
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")
_HOST_GENERATOR = torch.Generator()


@functools.cache
def build_view() -> ModuleType:
    """This process's copy of torch's namespace, in which patches have ``VIEW`` for their module.

    A name that it lacks (a submodule imported later; ``compile``, which is replaced in torch
    itself) is torch's.
    """
    view = ModuleType("torch", torch.__doc__)
    vars(view).update(vars(torch))
    del vars(view)["compile"]
    vars(view)["__getattr__"] = functools.partial(getattr, torch)
    cuda = ModuleType("torch.cuda", torch.cuda.__doc__)
    vars(cuda).update(vars(torch.cuda))
    cuda.random = ModuleType("torch.cuda.random")  # type: ignore[attr-defined]
    cuda.nvtx = ModuleType("torch.cuda.nvtx")  # type: ignore[attr-defined]
    vars(view)["cuda"] = cuda
    return view


def seen_by_megatron(value: object) -> object:
    """The view in place of ``torch``; anything else as it is."""
    return build_view() if value is torch else value


def is_cuda(device: object) -> bool:
    """Whether ``device`` (a name, a device, None) means a CUDA device."""
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` with ``device="cuda"`` read as the CPU and ``pin_memory`` left out."""

    @functools.wraps(factory)
    def create(*args: Any, **keywords: Any) -> Any:
        if "device" in keywords and is_cuda(keywords["device"]):
            keywords["device"] = CPU
        keywords.pop("pin_memory", None)  # locks memory for copies to a GPU: asks the driver
        return factory(*args, **keywords)

    return create


def first_argument_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a first argument that means CUDA read as "cpu"."""

    @functools.wraps(function, updated=())
    def call(device: Any, *args: Any, **keywords: Any) -> Any:
        return function("cpu" if is_cuda(device) else device, *args, **keywords)

    return call


def second_argument_on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with a first argument after ``self`` that means CUDA read as "cpu"."""

    @functools.wraps(method)
    def call(self: Any, device: Any, *args: Any, **keywords: Any) -> Any:
        return method(self, "cpu" if is_cuda(device) else device, *args, **keywords)

    return call


class _DeviceType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.device)

    def __call__(cls, *args: Any, **keywords: Any) -> torch.device:
        first = args[0] if args else keywords.get("device", keywords.get("type"))
        return CPU if is_cuda(first) else torch.device(*args, **keywords)


class Device(metaclass=_DeviceType):
    """``torch.device`` for ``isinstance`` and calls; "cuda", with any index, is the CPU."""


class Stream:
    """A stream on which everything has already run."""

    def __init__(self, device: object = None, priority: int = 0, **_: Any) -> None:
        self.device = CPU
        self.priority = priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """(lowest, highest) priority."""
        return (0, 0)

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """``event`` (a new one by default), recorded now."""
        event = event if event is not None else Event()
        event.record(self)
        return event


class Event:
    """A point in host time."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Takes the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to ``end_event``."""
        return (end_event._seconds - self._seconds) * 1e3

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """True: all work is done."""
        return True


STREAM = Stream()


class EveryDevice:
    """``torch.cuda.default_generators``: the CPU's generator under every index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return device_count()


def device_count() -> int:
    """The ranks on this node: each has "its" device."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def get_device_rng_state(device: object = "cuda") -> torch.Tensor:
    """The state of the generator that operations on CPU tensors draw from."""
    return torch.default_generator.get_state()


def set_device_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    """Sets the state of the generator that operations on CPU tensors draw from."""
    torch.default_generator.set_state(new_state)


def seed_device(seed: int) -> None:
    """Seeds the generator that operations on CPU tensors draw from."""
    torch.default_generator.manual_seed(seed)


def get_host_rng_state() -> torch.Tensor:
    """The state of the generator that data loading draws from."""
    return _HOST_GENERATOR.get_state()


def set_host_rng_state(new_state: torch.Tensor) -> None:
    """Sets the state of the generator that data loading draws from."""
    _HOST_GENERATOR.set_state(new_state)


def seed_everything(seed: int) -> torch.Generator:
    """Seeds both generators, as ``torch.manual_seed`` does with CUDA; returns the host's."""
    torch.manual_seed(seed)
    return _HOST_GENERATOR.manual_seed(seed)


@contextmanager
def host_generator() -> Iterator[None]:
    """Draws inside come from the host's generator; the device's stays where it is."""
    generator = torch.default_generator
    device_state = generator.get_state()
    generator.set_state(_HOST_GENERATOR.get_state())
    try:
        yield
    finally:
        _HOST_GENERATOR.set_state(generator.get_state())
        generator.set_state(device_state)


def memory_statistics(device: object = None) -> defaultdict[str, int]:
    """``torch.cuda.memory_stats``: zero under every name."""
    return defaultdict(int)


def device_properties(device: object = None) -> SimpleNamespace:
    """``torch.cuda.get_device_properties``: a device of no compute capability."""
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count() or 1
    )


def stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """``Tensor.cuda``: the tensor itself."""
    return tensor


def no_context(*_: Any, **__: Any) -> nullcontext[None]:
    """A context that changes nothing."""
    return nullcontext()
