"""The patches of megatron-core's own functions: each behaviour, and its absence when undone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.mimo.backend import Capabilities, cpu, select_backend
from megatron.mimo.backend.defaults import argument_defaults
from megatron.mimo.backend.patch import EVERY, VIEW, Patch
from megatron.mimo.backend.patching import PROCESS
from megatron.mimo.backend.stock import taken_from
from megatron.mimo.backend.torch_view import build_view

DEFAULTS = argument_defaults(Capabilities(device="cpu"))
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what fails without CUDA")


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    select_backend("cpu")


def _original(name: str) -> Any:
    """What the patch called ``name`` replaced; its module is imported, so that it is in effect."""
    patch = next(patch for patch in cpu.PATCHES if patch.name == name)
    importlib.import_module(patch.module)
    return PROCESS.originals[patch.target]


def _current(patch: Patch) -> Any:
    value: Any = importlib.import_module(patch.module)
    for step in patch.attribute.split("."):
        value = vars(value)[step]
    return value


def test_table_is_well_formed() -> None:
    assert len({patch.name for patch in cpu.PATCHES}) == len(cpu.PATCHES)
    assert len({patch.target for patch in cpu.PATCHES}) == len(cpu.PATCHES)
    assert all(patch.reason for patch in cpu.PATCHES)


@pytest.mark.parametrize(
    "patch", [p for p in cpu.PATCHES if p.module not in (VIEW, EVERY)], ids=lambda p: p.name
)
def test_patch_is_in_effect(patch: Patch) -> None:
    """The target exists in the installed megatron-core and something else stands there now."""
    importlib.import_module(patch.module)
    original = PROCESS.originals[patch.target]
    if patch.reason.startswith("taken from Transformer Engine"):  # not where neither is installed
        assert getattr(_current(patch), "__module__", "megatron.core").startswith("megatron.core")
    else:
        assert original is not None
        assert _current(patch) is not original


def test_modules_see_the_view_and_no_package_of_cuda() -> None:
    from megatron.core.optimizer import optimizer
    from megatron.core.transformer import transformer_block

    assert vars(optimizer)["torch"] is build_view()
    assert build_view() is not torch
    assert transformer_block.HAVE_APEX is False
    assert {p.attribute for p in cpu.PATCHES if p.module == EVERY} >= {"torch", "*", "HAVE_TE"}


def test_kernels_of_packages_give_way_to_megatrons_own() -> None:
    from megatron.core.utils import local_multi_tensor_scale

    replacement = taken_from("megatron.core.utils:local_multi_tensor_scale")
    assert replacement("a kernel of Transformer Engine") is local_multi_tensor_scale


def test_tensor_cuda_stays() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda(non_blocking=True) is tensor
    assert torch.nn.Linear(2, 2).cuda(torch.device("cpu")).weight.is_cpu


@NO_CUDA
def test_tensor_cuda_raises_unpatched() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        _original("Tensor.cuda")(torch.ones(2))


def test_jit_fuser_compiles_nothing() -> None:
    from megatron.core.fusions import fused_bias_dropout
    from megatron.core.jit import jit_fuser

    assert jit_fuser(os.getcwd) is os.getcwd
    assert not hasattr(
        fused_bias_dropout.bias_dropout_add_fused_train, "_torchdynamo_orig_callable"
    )
    assert hasattr(
        _original("jit fuser")(lambda x: x, backend="eager"), "_torchdynamo_orig_callable"
    )


def test_what_is_not_megatrons_is_compiled() -> None:
    def of_megatron() -> None: ...

    def of_another() -> None: ...

    class Model(torch.nn.Module): ...

    Model.__module__ = "megatron.core.models.gpt"
    of_megatron.__module__ = "megatron.core.fusions.fused"
    assert torch.compile(of_megatron) is of_megatron
    assert torch.compile(dynamic=True)(of_megatron) is of_megatron
    assert torch.compile(of_another, backend="eager")._torchdynamo_orig_callable is of_another
    assert torch.compile(backend="eager")(of_another)._torchdynamo_orig_callable is of_another
    assert torch.compile(Model(), backend="eager")._orig_mod is not None


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        ([], {}, DEFAULTS),
        (["--distributed-backend", "nccl"], {}, {"distributed_backend": "nccl"}),
        (
            [],
            {"transformer_impl": "inference_optimized"},
            {"transformer_impl": "inference_optimized"},
        ),
    ],
    ids=["defaults", "a flag wins", "the script's default wins"],
)
def test_argument_defaults(
    flags: list[str],
    own: dict[str, object],
    expected: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.training.arguments import parse_args

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser.set_defaults(**own)
        return parser

    monkeypatch.setattr(sys, "argv", ["script", *flags])
    arguments = vars(parse_args(provider))
    assert {name: arguments[name] for name in expected} == expected
    stock = vars(_original("argument defaults")())
    assert stock.keys() >= DEFAULTS.keys()
    assert not {name for name, value in DEFAULTS.items() if stock[name] == value}


def test_rng_callbacks_run_now() -> None:
    from megatron.core.tensor_parallel import random

    state = torch.Generator().manual_seed(11).get_state()
    with torch.random.fork_rng(devices=[]):
        random._set_cuda_rng_state(state)
        assert torch.equal(torch.default_generator.get_state(), state)


@NO_CUDA
def test_rng_callbacks_wait_for_cuda_unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(torch.cuda, "_queued_calls", [])
    _original("rng lazy call")(lambda: called.append(1))
    assert not called
    with pytest.raises((RuntimeError, AssertionError)):
        _original("rng lazy init")()


def test_rng_graph_safe_state() -> None:
    from megatron.core.tensor_parallel import random

    assert isinstance(random._get_cuda_rng_state(clone=True, graph_safe=True), torch.Generator)


@pytest.mark.parametrize("patched", [True, False])
def test_data_iteration_leaves_the_device_generator(
    patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import rerun_state_machine
    from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode

    machine = SimpleNamespace(get_mode=lambda: RerunMode.DISABLED)
    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", lambda: machine)
    step = RerunDataIterator.__next__ if patched else _original("host draws of data iteration")
    with torch.random.fork_rng(devices=[]):
        before = torch.default_generator.get_state()
        first = step(RerunDataIterator(iter(torch.rand(()) for _ in range(3))))
        second = step(RerunDataIterator(iter(torch.rand(()) for _ in range(3))))
        assert torch.equal(before, torch.default_generator.get_state()) == patched
    assert first != second


@pytest.mark.parametrize("patched", [True, False])
def test_data_setup_leaves_the_device_generator(
    patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import training

    def loaders(_: object) -> Any:
        return torch.utils.data.DataLoader([1, 2]), None, None

    arguments = SimpleNamespace(dataloader_type="single")
    monkeypatch.setattr(training, "get_args", lambda: arguments)
    monkeypatch.setattr(training, "build_train_valid_test_data_loaders", loaders)
    build = training.build_train_valid_test_data_iterators
    build = build if patched else _original("host draws of data set-up")
    with torch.random.fork_rng(devices=[]):
        before = torch.default_generator.get_state()
        build(None)
        assert torch.equal(before, torch.default_generator.get_state()) == patched


@pytest.mark.parametrize("patched", [True, False])
def test_autocast_reaches_the_backward_of_linear_layers(
    patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward of a CPU-autocast forward runs in the forward's precision, as it does with CUDA."""
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    if not patched:
        for method in ("forward", "backward"):
            original = _original(f"autocast of LinearWithFrozenWeight.{method}")
            monkeypatch.setattr(LinearWithFrozenWeight, method, original)
    inputs = torch.ones(2, 3, requires_grad=True)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = LinearWithFrozenWeight.apply(inputs, torch.ones(4, 3), None, False, group)
    assert output.dtype == torch.bfloat16
    if patched:
        output.sum().backward()
        torch.testing.assert_close(inputs.grad, torch.full((2, 3), 4.0))
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            output.sum().backward()


def test_splits_of_the_expert_dispatcher_are_integers() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    splits = torch.tensor([3, 0, 5])
    move = token_dispatcher.maybe_move_tensor_to_cpu
    assert [int(size) for size in move(splits, as_numpy=True)] == [3, 0, 5]
    assert not torch.is_tensor(move(splits, as_numpy=True))
    assert move(splits) is splits
    assert move(None, as_numpy=True) is None
    assert _original("splits of the expert dispatcher")(splits, as_numpy=True) is splits


def test_jit_warm_up_draws_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from megatron.training import initialize

    sizes = dict.fromkeys(
        (
            "ffn_hidden_size",
            "hidden_size",
            "seq_length",
            "micro_batch_size",
            "tensor_model_parallel_size",
            "context_parallel_size",
        ),
        1,
    )
    flags = dict.fromkeys(("bf16", "fp16", "swiglu", "sequence_parallel"), False)
    monkeypatch.setattr(initialize, "get_args", lambda: Namespace(**sizes, **flags))
    before = torch.get_rng_state()
    initialize.set_jit_fusion_options(tp_size=1)
    assert torch.equal(torch.get_rng_state(), before)
    _original("jit warm-up")(tp_size=1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_dataset_helper_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import utils
    from megatron.training import initialize

    calls: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(initialize, "get_args", lambda: None)
    monkeypatch.setattr(utils, "compile_helpers", lambda: calls.append("make"))
    initialize._compile_dependencies()
    assert calls == ["barrier"]
    calls.clear()
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    initialize._compile_dependencies()
    assert calls == ["make", "barrier"]


def test_checkpoint_metadata_without_strides() -> None:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    properties = TensorProperties(dtype=torch.float32)
    size = torch.Size([4])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=size)
    entry = TensorStorageMetadata(properties=properties, size=size, chunks=[chunk])
    metadata = Metadata(state_dict_metadata={"weight": entry})
    tensors = TorchDistLoadShardedStrategy().load_tensors_metadata(Path(), metadata)
    assert tensors["weight"].global_shape == (4,)
    assert metadata.state_dict_metadata["weight"].properties is properties
    if "strides" in vars(properties):
        with pytest.raises(TypeError, match="strides"):
            _original("checkpoint strides")(TorchDistLoadShardedStrategy(), Path(), metadata)


def test_tensors_received_while_loading_are_on_cpu() -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    tensor = ShardedTensor.from_rank_offsets("weight", torch.ones(3)).without_data()
    tensor.init_data("cuda")
    assert tensor.data is not None
    assert tensor.data.is_cpu


@NO_CUDA
def test_tensors_received_while_loading_fail_unpatched() -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    tensor = ShardedTensor.from_rank_offsets("weight", torch.ones(3)).without_data()
    with pytest.raises((RuntimeError, AssertionError)):
        _original("tensors loaded in parallel")(tensor, "cuda")


def test_recomputation_knows_of_fp8_only_with_transformer_engine() -> None:
    from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput

    assert CheckpointWithoutOutput().fp8 is HAVE_TE
    assert CheckpointWithoutOutput(fp8=None).fp8 is False


def test_recomputed_storage_is_seen_by_all_views() -> None:
    from megatron.core.tensor_parallel.random import _get_share_storage

    emptied = torch.zeros(2, 3)
    view, version = emptied[1], emptied._version
    emptied.untyped_storage().resize_(0)
    _get_share_storage()(emptied, torch.arange(6.0).view(2, 3))
    assert view.tolist() == [3, 4, 5]
    assert emptied._version == version


LATE = """
import megatron.core.optimizer, megatron.core.utils, torch
from megatron.core.fusions import fused_bias_dropout, fused_bias_gelu
from megatron.core.optimizer import clip_grads, optimizer
stock = clip_grads.clip_grad_by_total_norm_fp32
assert hasattr(fused_bias_gelu.bias_gelu, "_torchdynamo_orig_callable")
from megatron.mimo.backend import select_backend
select_backend("cpu")
assert clip_grads.clip_grad_by_total_norm_fp32 is not stock
assert optimizer.clip_grad_by_total_norm_fp32 is clip_grads.clip_grad_by_total_norm_fp32
assert not hasattr(fused_bias_gelu.bias_gelu, "_torchdynamo_orig_callable")
assert not hasattr(fused_bias_dropout.bias_dropout_add_fused_train, "_torchdynamo_orig_callable")
assert megatron.core.utils.torch is not torch
assert not torch.cuda.is_initialized()
"""


@pytest.mark.wide
@pytest.mark.slow
def test_modules_imported_before_are_patched_too() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", LATE], check=True, env=environment)
