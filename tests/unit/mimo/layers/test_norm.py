"""The norms against torch's modules, against their closed-form gradients, and in layer specs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.core.models.mimo.errors import ConfigError

HIDDEN = 24


def make_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4}
    return TransformerConfig(**(settings | {"transformer_impl": "local"} | changes))


def build(normalization: str, eps: float = 1e-3, **changes: Any) -> nn.Module:
    from megatron.mimo.layers import Norm

    module = Norm(make_config(normalization=normalization, **changes), HIDDEN, eps)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(HIDDEN, generator=generator))
    return module


def sample(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input far from zero mean, and a gradient of the output: [S, B, H] both."""
    generator = torch.Generator().manual_seed(9)
    hidden, gradient = torch.randn(2, 5, 3, HIDDEN, generator=generator)
    return (3 * hidden + 1).to(dtype).requires_grad_(), gradient.to(dtype)


def twin(module: nn.Module, normalization: str) -> nn.Module:
    """torch's module with the same weights."""
    twin = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[normalization](HIDDEN, eps=1e-3)
    twin.load_state_dict(module.state_dict())
    return twin


def norm_in_float64(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, normalization: str
) -> Tensor:
    hidden, weight = hidden.double(), weight.double()
    if normalization == "LayerNorm":
        hidden = hidden - hidden.mean(-1, keepdim=True)
    scaled = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    return scaled if bias is None else scaled + bias.double()


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_equals_torchs_module(normalization: str) -> None:
    module, (hidden, gradient) = build(normalization), sample()
    reference = twin(module, normalization)
    module(hidden).backward(gradient)
    input_gradient, hidden.grad = hidden.grad, None
    reference(hidden).backward(gradient)
    torch.testing.assert_close(module(hidden), reference(hidden), rtol=0, atol=0)
    torch.testing.assert_close(input_gradient, hidden.grad, rtol=0, atol=0)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_gradients_have_their_closed_form(normalization: str, centred: bool) -> None:
    module = build(normalization, layernorm_zero_centered_gamma=centred)
    hidden, gradient = sample()
    module(hidden).backward(gradient)

    x, dy = hidden.detach().double(), gradient.double()
    if normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    inverse = (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    normed = x * inverse
    scaled = dy * (module.weight.detach().double() + (1.0 if centred else 0.0))
    dx = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
    if normalization == "LayerNorm":
        dx = dx - scaled.mean(-1, keepdim=True)
        torch.testing.assert_close(module.bias.grad.double(), dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), dx * inverse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        module.weight.grad.double(), (dy * normed).sum((0, 1)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_bf16_is_the_exact_result_rounded(
    normalization: str, centred: bool, residual: torch.dtype
) -> None:
    module = build(
        normalization, layernorm_zero_centered_gamma=centred, params_dtype=torch.bfloat16
    )
    hidden, _ = sample(residual)
    output = module(hidden)
    assert output.dtype == module.weight.dtype == torch.bfloat16
    weight = module.weight.double() + (1.0 if centred else 0.0)
    expected = norm_in_float64(hidden, weight, getattr(module, "bias", None), normalization)
    # One rounding of the result, half a unit in the last of 8 bits, and one of fp32's products.
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2**-8)
    output.float().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == residual


@pytest.mark.parametrize("centred", [False, True])
def test_a_new_norm_scales_by_one_and_marks_its_parameters(centred: bool) -> None:
    from megatron.mimo.layers import Norm

    config = make_config(
        layernorm_zero_centered_gamma=centred,
        sequence_parallel=True,
        tensor_model_parallel_size=2,
        layernorm_epsilon=0.5,
    )
    module = Norm(config=config, hidden_size=HIDDEN)
    assert all(parameter.sequence_parallel for parameter in module.parameters())
    hidden, _ = sample()
    expected = nn.functional.layer_norm(hidden, (HIDDEN,), eps=0.5)
    torch.testing.assert_close(module(hidden), expected)
    module.bfloat16()  # as Megatron's Float16Module does
    assert all(parameter.sequence_parallel for parameter in module.parameters())


def test_what_it_cannot_do_is_refused() -> None:
    from megatron.mimo.layers import Norm, language_layer_spec

    with pytest.raises(ConfigError, match="memory_efficient_layer_norm"):
        Norm(make_config(memory_efficient_layer_norm=True), HIDDEN)
    with pytest.raises(ConfigError, match="'L2Norm'; expected 'LayerNorm'"):
        Norm(make_config(normalization="L2Norm"), HIDDEN)
    serving = make_config()
    serving.transformer_impl = "inference_optimized"
    with pytest.raises(ConfigError, match="inference_optimized"):
        language_layer_spec(serving, pp_rank=0)


def test_specs_hold_no_stock_norm_and_the_right_mask() -> None:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.mimo.layers import Norm, encoder_layer_spec, language_layer_spec

    config = make_config(normalization="RMSNorm", qk_layernorm=True)
    language = language_layer_spec(config, pp_rank=0).submodules
    encoder = encoder_layer_spec(config).submodules
    for block, mask in ((language, AttnMaskType.causal), (encoder, AttnMaskType.no_mask)):
        assert block.layer_norm is Norm
        assert len(block.layer_specs) == config.num_layers
        for layer in block.layer_specs:
            assert layer.submodules.input_layernorm is Norm
            assert layer.submodules.pre_mlp_layernorm is Norm
            assert layer.submodules.self_attention.params["attn_mask_type"] == mask
    attention = language.layer_specs[0].submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is Norm


def test_specs_follow_the_pipeline_stage() -> None:
    from megatron.mimo.layers import language_layer_spec

    config = make_config(
        num_layers=6,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=4,
    )
    specs = [language_layer_spec(config, pp_rank=rank).submodules for rank in range(2)]
    assert [len(spec.layer_specs) for spec in specs] == [4, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_cuda_equals_cpu(normalization: str) -> None:
    module, (hidden, gradient) = build(normalization, params_dtype=torch.bfloat16), sample()
    expected = module(hidden)
    on_gpu = hidden.detach().cuda().requires_grad_()
    output = module.cuda()(on_gpu)
    output.backward(gradient.cuda().bfloat16())
    torch.testing.assert_close(output.cpu(), expected, rtol=2**-7, atol=2**-8)
    assert on_gpu.grad is not None


@pytest.mark.te
def test_transformer_engine_is_the_default_where_installed() -> None:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.mimo.layers import Norm, encoder_layer_spec, language_layer_spec

    with_te = make_config(transformer_impl="transformer_engine")
    assert language_layer_spec(with_te, pp_rank=0).submodules.layer_norm is TENorm
    assert encoder_layer_spec(with_te).submodules.layer_norm is TENorm
    assert language_layer_spec(make_config(), pp_rank=0).submodules.layer_norm is Norm
