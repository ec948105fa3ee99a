"""What is replaced so that megatron-core 0.19 runs without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.mimo.backend import gloo, stock
from megatron.mimo.backend import torch_view as view
from megatron.mimo.backend.defects import DEFECTS
from megatron.mimo.backend.patch import EVERY, VIEW, Patch


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _answer(value: Any) -> Callable[[Any], Any]:
    """A function of any arguments that returns ``value``."""
    return lambda original: lambda *_, **__: value


def _seen(name: str, reason: str, replacement: Callable[[Any], Any]) -> Patch:
    return Patch(name=name, target=f"{VIEW}:{name}", reason=reason, replacement=replacement)


_ALLOCATES = 'allocates with device="cuda", a literal in schedules, optimizers and training'
_STREAMS = "overlap of communication and timers are written with streams and events"
_STATISTICS = "logged by training; read from the driver"
_DEVICE_RNG = "the device generator: dropout outside and inside the tracker's forks"
_HOST_RNG = "the host generator, apart from the device's: only one of the TP peers loads data"

_FACTORIES = tuple(
    _seen(name, _ALLOCATES, view.on_cpu)
    for name in (
        "empty",
        "empty_like",
        "ones",
        "rand",
        "tensor",
        "zeros",
    )
)

_DEVICES = (
    _seen(
        "cuda.is_available", "initialize_megatron asserts it; timers branch on it", _answer(True)
    ),
    _seen(
        "cuda.device_count",
        "the model-parallel groups and the random seed are set up only where it is positive",
        _always(view.device_count),
    ),
    _seen("cuda.current_device", "used as the device of buffers and counters", _answer(view.CPU)),
    _seen("cuda.set_device", "called once the local rank is known", _answer(None)),
    _seen(
        "cuda.get_device_capability", "asked before kernels are chosen: none fit", _answer((0, 0))
    ),
    _seen(
        "cuda.get_device_properties",
        "validate_args asks for the architecture under TP or CP",
        _always(view.device_properties),
    ),
    _seen("device", "names the device of meta models and of signal handling", _always(view.Device)),
    _seen("autocast", 'the schedules enter autocast("cuda")', view.first_argument_on_cpu),
)

_STREAM_PATCHES = (
    _seen("cuda.Stream", _STREAMS, _always(view.Stream)),
    _seen("cuda.Event", _STREAMS, _always(view.Event)),
    _seen("cuda.stream", _STREAMS, _always(view.no_context)),
    _seen("cuda.current_stream", _STREAMS, _answer(view.STREAM)),
    _seen("cuda.synchronize", "timers and checkpoint writers wait for the device", _answer(None)),
    _seen(
        "cuda.nvtx.range_push", "profiling ranges; a torch built without CUDA raises", _answer(None)
    ),
    _seen(
        "cuda.nvtx.range_pop", "profiling ranges; a torch built without CUDA raises", _answer(None)
    ),
)

_STATISTIC_PATCHES = (
    _seen("cuda.memory_stats", _STATISTICS, _always(view.memory_statistics)),
    _seen("cuda.device_memory_used", _STATISTICS, _answer(0)),
)

_RANDOM = (
    _seen("cuda.get_rng_state", _DEVICE_RNG, _always(view.get_device_rng_state)),
    _seen("cuda.set_rng_state", _DEVICE_RNG, _always(view.set_device_rng_state)),
    _seen("cuda.random.get_rng_state", _DEVICE_RNG, _always(view.get_device_rng_state)),
    _seen("cuda.manual_seed", _DEVICE_RNG, _always(view.seed_device)),
    _seen("cuda.default_generators", _DEVICE_RNG, _always(view.EveryDevice())),
    _seen("get_rng_state", _HOST_RNG, _always(view.get_host_rng_state)),
    _seen("set_rng_state", _HOST_RNG, _always(view.set_host_rng_state)),
    _seen("manual_seed", "seeds both generators", _always(view.seed_everything)),
    Patch(
        name="rng lazy call",
        target="megatron.core.tensor_parallel.random:_lazy_call",
        reason="queues the change of the generator's state until CUDA is initialised: never",
        replacement=_always(stock.call_now),
    ),
    Patch(
        name="rng lazy init",
        target="megatron.core.tensor_parallel.random:_lazy_init",
        reason="initialises CUDA",
        replacement=_always(stock.do_nothing),
    ),
    Patch(
        name="host draws of data iteration",
        target="megatron.core.rerun_state_machine:RerunDataIterator.__next__",
        reason="an epoch's end or an augmentation draws on TP rank 0 only",
        replacement=stock.drawing_from_host,
    ),
    Patch(
        name="host draws of data set-up",
        target="megatron.training.training:build_train_valid_test_data_iterators",
        reason="a DataLoader draws its base seed on TP rank 0 only",
        replacement=stock.drawing_from_host,
    ),
)

_LOCAL = "megatron.core.utils:local_multi_tensor_"
_APPLIER = {"multi_tensor_applier": _LOCAL + "applier"}
_SCALE = {"multi_tensor_scale_impl": _LOCAL + "scale"}
_TORCH_NORM = "megatron.core.transformer.torch_norm:WrappedTorchNorm"

_CPU_TYPES = tuple(
    Patch(
        name=f"tensor types of {kind.rpartition(':')[2]}",
        target=f"megatron.core.optimizer.{kind}",
        reason="compares Tensor.type() with literal torch.cuda types and raises",
        replacement=stock.naming_types_of_cuda,
    )
    for kind in (
        "distrib_optimizer:DistributedOptimizer.__init__",
        "optimizer:Float16OptimizerWithFloat16Params.__init__",
        "clip_grads:clip_grad_by_total_norm_fp32",
    )
)

_AUTOCAST = tuple(
    Patch(
        name=f"autocast of {function}.{method}",
        target=f"megatron.core.tensor_parallel.layers:{function}.{method}",
        reason='custom_fwd/custom_bwd(device_type="cuda") ignore autocast on CPU tensors',
        replacement=stock.autocast_for_cpu,
    )
    for function in ("LinearWithFrozenWeight", "LinearWithGradAccumulationAndAsyncCommunication")
    for method in ("forward", "backward")
)

_TAKEN = (
    ("core.optimizer.optimizer", _APPLIER | _SCALE),
    ("core.optimizer.clip_grads", _APPLIER | _SCALE | {"l2_norm_impl": _LOCAL + "l2_norm"}),
    ("training.utils.common_utils", _APPLIER | {"multi_tensor_l2norm": _LOCAL + "l2_norm"}),
    ("core.transformer.transformer_block", {"LayerNormImpl": _TORCH_NORM}),
    ("core.models.gpt.gpt_layer_specs", {"LNImpl": _TORCH_NORM}),
    ("core.models.vision.vit_layer_specs", {"LNImpl": _TORCH_NORM}),
)

_WITHOUT_TE = (
    *(
        Patch(
            name=f"{name} of {module}",
            target=f"megatron.{module}:{name}",
            reason="taken from Transformer Engine or apex where they are installed: CUDA kernels",
            replacement=stock.taken_from(source),
        )
        for module, names in _TAKEN
        for name, source in names.items()
    ),
    Patch(
        name="multi_tensor_scale_tensor_impl of core.optimizer.clip_grads",
        target="megatron.core.optimizer.clip_grads:multi_tensor_scale_tensor_impl",
        reason="taken from Transformer Engine, which alone has it; None where it is absent",
        replacement=_always(None),
    ),
)

_GLOO = (
    Patch(
        name="one gloo device",
        target="torch.distributed.distributed_c10d:ProcessGroupGloo",
        reason="each of Megatron's groups opens a device with its own thread and socket",
        replacement=gloo.sharing_one_device,
    ),
    *(
        Patch(
            name=f"{module}.new_group",
            target=f"{module}:new_group",
            reason='bridges ask for "nccl"; a fast member can destroy a group in the making',
            replacement=gloo.connected_on_return,
        )
        for module in ("torch.distributed.distributed_c10d", "torch.distributed")
    ),
)

_MODULES = (
    Patch(
        name="torch",
        target=f"{EVERY}:torch",
        reason="asks for CUDA devices, streams and generators; gets the CPU's",
        replacement=view.seen_by_megatron,
    ),
    Patch(
        name="compiled functions",
        target=f"{EVERY}:*",
        reason="torch.compile, as by the jit fuser, in what was decorated before it was replaced",
        replacement=stock.uncompiled,
    ),
    *(
        Patch(
            name=answer,
            target=f"{EVERY}:{answer}",
            reason="says that a package is there which computes on CUDA alone",
            replacement=_always(False),
        )
        for answer in ("HAVE_TE", "HAVE_TE_GRAPHS", "HAVE_TE_EP", "HAVE_APEX")
    ),
)

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="Tensor.cuda",
        target="torch:Tensor.cuda",
        reason="models, batches and checkpoints are moved with .cuda(), which raises",
        replacement=_always(view.stay),
    ),
    Patch(
        name="jit fuser",
        target="megatron.core.jit:jit_fuser",
        reason="torch.compile: minutes of C++ compilation for functions of a few operations",
        replacement=_always(stock.undecorated),
    ),
    Patch(
        name="torch.compile",
        target="torch:compile",
        reason="its compiler takes two seconds to import, for functions that stay as they are",
        replacement=stock.uncompiled_in_megatron,
    ),
    *_MODULES,
    *_DEVICES,
    *_FACTORIES,
    *_STREAM_PATCHES,
    *_STATISTIC_PATCHES,
    *_RANDOM,
    *_CPU_TYPES,
    *_AUTOCAST,
    *_WITHOUT_TE,
    Patch(
        name="splits of the expert dispatcher",
        target="megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        reason="leaves a tensor that is on the CPU a tensor; all_to_all wants integers",
        replacement=stock.as_numpy_on_cpu,
    ),
    Patch(
        name="recomputed storage",
        target="megatron.core.tensor_parallel.random:_get_share_storage",
        reason="compiles C++ in the first backward pass, where a compiler and ninja may be missing",
        replacement=_answer(stock.refill_storage),
    ),
    *_GLOO,
    Patch(
        name="tensors loaded in parallel",
        target="megatron.core.dist_checkpointing.mapping:ShardedTensor.init_data",
        reason='a parallel load allocates by init_data("cuda") what it receives from its peers',
        replacement=view.second_argument_on_cpu,
    ),
    *DEFECTS,
)
"""What :func:`megatron.mimo.backend.cpu.apply` puts in place, in this order."""
