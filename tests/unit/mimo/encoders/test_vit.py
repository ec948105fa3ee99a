"""The vision transformer against plain PyTorch with the same weights, on one rank and under TP.

Shape legend: N images, P patches, H hidden, L layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError, InputError

LAYERS, HIDDEN, HEADS, PATCH, CHANNELS, IMAGE = 3, 32, 4, 4, 2, (8, 12)
PATCHES = (IMAGE[0] // PATCH) * (IMAGE[1] // PATCH)


def language_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 5,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(settings | changes))


def build_vit(groups: Any = None, *, tp: int = 1, **changes: Any) -> Any:
    from megatron.mimo.encoders import VisionTransformer, encoder_config
    from megatron.mimo.layers import encoder_layer_spec

    config = encoder_config(
        language_config(tensor_model_parallel_size=tp),
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
    )
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "channels": CHANNELS} | changes
    return VisionTransformer(config, encoder_layer_spec(config), pg_collection=groups, **sizes)


def random_pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, CHANNELS, *IMAGE, generator=generator)


def row_weights(count: int) -> Tensor:
    """What the rows are multiplied with for a scalar loss, so that rows differ in gradient."""
    return torch.randn(count * PATCHES, HIDDEN, generator=torch.Generator().manual_seed(6))


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: 0.3 * torch.randn(shapes[name], generator=generator) + ("layernorm.weight" in name)
        for name in sorted(shapes)
    }


def run_megatron(tp: int, images: int) -> dict[str, Any]:
    """On each rank: rows and gradients, with weights placed by the checkpoint's own description."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from tests.rank_pool import model_parallel

    vit = build_vit(model_parallel(tp=tp), tp=tp)
    shards = [s for s in vit.sharded_state_dict().values() if isinstance(s, ShardedTensor)]
    weights = random_weights({shard.key: shard.global_shape for shard in shards})

    def part(whole: Tensor, shard: ShardedTensor) -> Tensor:
        axes = shard.prepend_axis_num
        for offset in shard.global_offset[:axes]:
            whole = whole[offset]
        for axis, (offset, size) in enumerate(
            zip(shard.global_offset[axes:], shard.local_shape, strict=True)
        ):
            whole = whole.narrow(axis, offset, size)
        return whole

    for shard in shards:
        shard.data.data.copy_(part(weights[shard.key], shard))
    rows = vit(random_pixels(images))
    (rows * row_weights(images)).sum().backward()
    owners = {parameter.data_ptr(): parameter for parameter in vit.parameters()}
    covered = {shard.data.data_ptr() for shard in shards}
    return {
        "rows": rows.detach(),
        "all parameters are saved": covered == set(owners),
        "grads": [
            (
                shard.key,
                shard.global_offset,
                shard.prepend_axis_num,
                owners[shard.data.data_ptr()].grad,
            )
            for shard in shards
        ],
        "shapes": {shard.key: shard.global_shape for shard in shards},
    }


def reference(weights: dict[str, Tensor], pixels_NCHW: Tensor) -> Tensor:
    """The same transformer, one image and one layer at a time."""

    def linear(x: Tensor, name: str, *layer: int) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"][layer], weights[f"{name}.bias"][layer])

    def norm(x: Tensor, name: str, *layer: int) -> Tensor:
        weight, bias = weights[f"{name}weight"][layer], weights[f"{name}bias"][layer]
        return F.layer_norm(x, (HIDDEN,), weight, bias)

    rows = []
    for pixels_CHW in pixels_NCHW:
        patches = [
            pixels_CHW[:, top : top + PATCH, left : left + PATCH].flatten()
            for top in range(0, IMAGE[0], PATCH)
            for left in range(0, IMAGE[1], PATCH)
        ]
        x_PH = linear(torch.stack(patches), "patch_embedding") + weights["position_embedding"]
        for layer in range(LAYERS):
            name = "transformer.layers."
            qkv = linear(norm(x_PH, name + "self_attention.linear_qkv.layer_norm_", layer),
                         name + "self_attention.linear_qkv", layer)  # fmt: skip
            outputs = []
            for head in qkv.chunk(HEADS, dim=1):
                query, key, value = head.chunk(3, dim=1)
                scores = (query @ key.T) / (HIDDEN // HEADS) ** 0.5
                outputs.append(scores.softmax(dim=1) @ value)
            mixed = torch.cat(outputs, dim=1)
            x_PH = x_PH + linear(mixed, name + "self_attention.linear_proj", layer)
            inner = linear(norm(x_PH, name + "mlp.linear_fc1.layer_norm_", layer),
                           name + "mlp.linear_fc1", layer)  # fmt: skip
            x_PH = x_PH + linear(F.gelu(inner), name + "mlp.linear_fc2", layer)
        rows.append(norm(x_PH, "transformer.final_layernorm."))
    return torch.cat(rows)


@pytest.mark.parametrize("tp", [1, 2])
def test_equals_plain_pytorch(ranks: Any, tp: int) -> None:
    images = 3
    results = ranks(tp)(run_megatron, tp, images)
    weights = random_weights(results[0]["shapes"])
    for weight in weights.values():
        weight.requires_grad_()
    rows = reference(weights, random_pixels(images))
    (rows * row_weights(images)).sum().backward()
    for result in results:
        assert result["all parameters are saved"]
        torch.testing.assert_close(result["rows"], rows.detach(), rtol=1e-4, atol=1e-5)
        for name, offset, axes, grad in result["grads"]:
            expected = weights[name].grad
            for at in offset[:axes]:
                expected = expected[at]
            for axis, (at, size) in enumerate(zip(offset[axes:], grad.shape, strict=True)):
                expected = expected.narrow(axis, at, size)
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4, msg=name)


def no_images(tp: int) -> list[bool]:
    result = run_megatron(tp, 0)
    assert result["rows"].shape == (0, HIDDEN)
    return [grad is not None and not grad.any() for _, _, _, grad in result["grads"]]


@pytest.mark.parametrize("tp", [1, 2])
def test_no_images_give_no_rows_and_zero_gradients(ranks: Any, tp: int) -> None:
    for zero in ranks(tp)(no_images, tp):
        assert zero
        assert all(zero)


def low_precision() -> tuple[torch.dtype, tuple[int, ...]]:
    from tests.rank_pool import model_parallel

    rows = build_vit(model_parallel()).bfloat16()(random_pixels(2))
    return rows.dtype, tuple(rows.shape)


def test_runs_in_bf16(ranks: Any) -> None:
    assert ranks(1)(low_precision) == [(torch.bfloat16, (2 * PATCHES, HIDDEN))]


def refusals() -> dict[str, str]:
    """What each wrong use is told; "nothing" where it is let through."""
    from tests.rank_pool import model_parallel

    groups = model_parallel()
    vit = build_vit(groups)

    def told(error: type[Exception], use: Any) -> str:
        try:
            use()
        except error as caught:
            return str(caught)
        return "nothing"

    return {
        "patch": told(ConfigError, lambda: build_vit(groups, patch_size=5)),
        "channels": told(ConfigError, lambda: build_vit(groups, channels=0)),
        "shape": told(InputError, lambda: vit(torch.zeros(2, CHANNELS, 8, 8))),
        "dtype": told(InputError, lambda: vit(torch.zeros(2, CHANNELS, *IMAGE).int())),
    }


def test_refusals(ranks: Any) -> None:
    [told] = ranks(1)(refusals)
    assert "8 x 12 pixels is not divisible into patches of 5 x 5" in told["patch"]
    assert "channels=0" in told["channels"]
    assert "float32 [2, 2, 8, 8]; expected floating point [N, 2, 8, 12]" in told["shape"]
    assert "int32 [2, 2, 8, 12]" in told["dtype"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 30, 4), "hidden size 30 is not divisible by its 4 attention heads"),
        ((2, 30, 3), "3 attention heads are not divisible by the tensor-parallel size 2"),
        ((0, 32, 4), "num_layers is 0"),
        ((2, 32, 0), "num_attention_heads is 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int], message: str) -> None:
    from megatron.mimo.encoders import encoder_config

    layers, hidden, heads = sizes
    with pytest.raises(ConfigError, match=message):
        encoder_config(
            language_config(tensor_model_parallel_size=2),
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
        )


def test_stages_have_to_be_equal() -> None:
    from megatron.mimo.encoders import encoder_config

    with pytest.raises(ConfigError, match="3 layers are not divisible by its 2 pipeline stages"):
        encoder_config(
            language_config(), num_layers=3, hidden_size=32, num_attention_heads=4, stages=2
        )


def test_the_width_of_the_mlp_has_to_fit() -> None:
    from megatron.mimo.encoders import plain_encoder_config

    with pytest.raises(ConfigError, match=r"MLP has width 31, .* tensor-parallel size 2"):
        plain_encoder_config(
            language_config(tensor_model_parallel_size=2),
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            ffn_hidden_size=31,
            activation="gelu",
            layernorm_epsilon=1e-5,
        )


def test_encoder_config_drops_what_splits_the_sequence_and_the_layers() -> None:
    from megatron.mimo.encoders import encoder_config

    language = language_config(
        num_layers=6,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        context_parallel_size=2,
        init_method_std=0.07,
    )
    config = encoder_config(language, num_layers=3, hidden_size=64, num_attention_heads=4)
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 1)
    assert (config.sequence_parallel, config.context_parallel_size) == (False, 1)
    assert (config.kv_channels, config.ffn_hidden_size, config.num_query_groups) == (16, 256, 4)
    assert language.num_layers == 6
    weight = config.output_layer_init_method(torch.empty(300, 300))
    assert weight.std() == pytest.approx(0.07 / (2 * 3) ** 0.5, rel=0.05)


def test_encoder_beside_a_mixture_of_experts_is_dense() -> None:
    from megatron.mimo.encoders import encoder_config

    language = language_config(
        tensor_model_parallel_size=2,
        num_moe_experts=4,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,  # and the shards of a run's arguments, which follow it
        expert_tensor_parallel_num_weight_shards=1,
        moe_ffn_hidden_size=24,
        moe_router_topk=3,
        add_bias_linear=False,
    )
    config = encoder_config(language, num_layers=3, hidden_size=64, num_attention_heads=4)
    assert (config.num_moe_experts, config.expert_model_parallel_size) == (None, 1)
    assert (config.moe_ffn_hidden_size, config.ffn_hidden_size) == (None, 256)
    assert (language.num_moe_experts, language.moe_ffn_hidden_size) == (4, 24)
