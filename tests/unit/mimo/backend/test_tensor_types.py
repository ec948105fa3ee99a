"""Types of tensors on the CPU, as megatron-core's optimizers compare them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.mimo.backend import select_backend
from megatron.mimo.backend.patching import PROCESS
from megatron.mimo.backend.stock import naming_types_of_cuda


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    select_backend("cpu")


def _original(target: str) -> Any:
    return PROCESS.originals[f"megatron.core.optimizer.{target}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_optimizers_sort_cpu_parameters_by_precision(dtype: torch.dtype) -> None:
    """As on CUDA: fp32 parameters are their own, of the others fp32 copies are trained."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Optimizer

    def build(initialise: Any) -> Any:
        optimizer = Optimizer.__new__(Optimizer)
        parameter = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        config = OptimizerConfig(optimizer="sgd", lr=1.0, bf16=True)
        initialise(optimizer, torch.optim.SGD([parameter], lr=1.0), config, None, None)
        return optimizer

    optimizer, is_fp32 = build(Optimizer.__init__), dtype == torch.float32
    assert len(optimizer.fp32_from_fp32_groups[0]) == is_fp32
    assert len(optimizer.fp32_from_float16_groups[0]) == (not is_fp32)
    assert optimizer.param_groups[0]["params"][0].dtype == torch.float32
    with pytest.raises(TypeError, match=r"must be one of torch\.cuda\.FloatTensor"):
        build(_original("optimizer:Float16OptimizerWithFloat16Params.__init__"))


def test_types_are_those_of_cuda_within_a_patched_function_alone() -> None:
    def types(tensor: torch.Tensor) -> tuple[str, torch.dtype, torch.device]:
        return tensor.type(), tensor.type(torch.float16).dtype, (tensor + 1).device

    def fail(_: torch.Tensor) -> None:
        raise ValueError

    tensor = torch.ones(1)
    for name in ("Half", "BFloat16", "Float"):
        typed = tensor.type(f"torch.{name}Tensor")
        expected = (f"torch.cuda.{name}Tensor", torch.float16, torch.device("cpu"))
        assert naming_types_of_cuda(types)(typed) == expected
    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        naming_types_of_cuda(fail)(tensor)
    assert tensor.type() == "torch.FloatTensor"


def test_clip_grads_takes_cpu_gradients() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    def clip(function: Any) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0])
        function([parameter], max_norm=1.0, total_norm=5.0)
        return parameter.grad

    torch.testing.assert_close(clip(clip_grad_by_total_norm_fp32), torch.tensor([0.6, 0.8]))
    with pytest.raises(AssertionError):
        clip(_original("clip_grads:clip_grad_by_total_norm_fp32"))
