"""Projectors against plain PyTorch with the same weights, on one rank and under TP.

Legend: N rows, I input width, H output width, P rows of an item, Q queries.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from tests.rank_pool import RankPool, model_parallel
from tests.unit.mimo.encoders.test_clip import language_config

INPUT, OUTPUT, GRID, QUERIES, HEADS = 8, 12, (4, 6), 5, 4
EPSILON = 0.01
ROWS = 2 * GRID[0] * GRID[1]  # two items

Weights = dict[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str, *layer: int) -> Tensor:
    bias = weights.get(f"{name}.bias")
    return F.linear(x, weights[f"{name}.weight"][layer], None if bias is None else bias[layer])


def norm(x: Tensor, weights: Weights, name: str, epsilon: float, *layer: int) -> Tensor:
    weight, bias = weights[f"{name}.weight"][layer], weights[f"{name}.bias"][layer]
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def one_layer(x_NI: Tensor, weights: Weights) -> Tensor:
    return linear(x_NI, weights, "linear_fc1")


def three_layers(x_NI: Tensor, weights: Weights) -> Tensor:
    for number in (1, 2):
        x_NI = F.silu(linear(x_NI, weights, f"linear_fc{number}"))
    return linear(x_NI, weights, "linear_fc3")


def two_layers(x: Tensor, weights: Weights, prefix: str = "") -> Tensor:
    inner = F.gelu(linear(x, weights, f"{prefix}linear_fc1"))
    return linear(inner, weights, f"{prefix}linear_fc2")


def squares(x_NI: Tensor) -> Tensor:
    """One square after the other, in loops."""
    joined = []
    for item in x_NI.split(GRID[0] * GRID[1]):
        for top in range(0, GRID[0], 2):
            for left in range(0, GRID[1], 2):
                corner = top * GRID[1] + left
                below = corner + GRID[1]
                joined.append(item[[corner, corner + 1, below, below + 1]].flatten())
    return torch.stack(joined)


def merger(x_NI: Tensor, weights: Weights) -> Tensor:
    return two_layers(squares(norm(x_NI, weights, "norm", 1e-6)), weights, "projector.")


def shuffle(x_NI: Tensor, weights: Weights) -> Tensor:
    return two_layers(norm(squares(x_NI), weights, "norm", 1e-6), weights, "projector.")


def pooled(x_NI: Tensor, weights: Weights) -> Tensor:
    rows = squares(x_NI).view(-1, 4, INPUT).sum(dim=1) / 4
    normed = rows / (rows.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
    return linear(normed * (1 + weights["norm.weight"]), weights, "projector.linear_fc1")


def perceiver(x_NI: Tensor, weights: Weights) -> Tensor:
    outputs = []
    for item_PI in norm(x_NI, weights, "norm", 1e-5).split(GRID[0] * GRID[1]):
        x_QI = weights["queries"]
        for layer in range(2):
            name = "transformer.layers."
            attention = name + "cross_attention."
            normed = norm(x_QI, weights, name + "pre_cross_attn_layernorm", 1e-5, layer)
            queries = linear(normed, weights, attention + "linear_q", layer).chunk(HEADS, dim=1)
            both = linear(item_PI, weights, attention + "linear_kv", layer).chunk(HEADS, dim=1)
            heads = []
            for query, pair in zip(queries, both, strict=True):
                key, value = pair.chunk(2, dim=1)
                scores = query @ key.T / (INPUT // HEADS) ** 0.5
                heads.append(scores.softmax(dim=1) @ value)
            x_QI = x_QI + linear(torch.cat(heads, dim=1), weights, attention + "linear_proj", layer)
            normed = norm(x_QI, weights, name + "pre_mlp_layernorm", 1e-5, layer)
            inner = F.gelu(linear(normed, weights, name + "mlp.linear_fc1", layer))
            x_QI = x_QI + linear(inner, weights, name + "mlp.linear_fc2", layer)
        x_QI = norm(x_QI, weights, "transformer.final_layernorm", 1e-5)
        outputs.append(linear(x_QI, weights, "projector.linear_fc1"))
    return torch.cat(outputs)


WIDTHS = {"input_size": INPUT, "output_size": OUTPUT}
SQUARES = {**WIDTHS, "grid": GRID, "side": 2}
POOLED = {**SQUARES, "layernorm_epsilon": EPSILON}
RESAMPLED = {
    **WIDTHS,
    "rows_per_item": GRID[0] * GRID[1],
    "num_queries": QUERIES,
    "num_layers": 2,
    "num_attention_heads": HEADS,
}
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Weights], Tensor]]] = {
    "one layer": ("Projector", {**WIDTHS, "num_layers": 1}, one_layer),
    "two layers without bias": ("Projector", {**WIDTHS, "bias": False}, two_layers),
    "three layers": (
        "Projector",
        {**WIDTHS, "num_layers": 3, "hidden_size": 20, "activation": "silu"},
        three_layers,
    ),
    "patch merger": ("SquareProjector", {**SQUARES, "norm": "rows"}, merger),
    "pooled": ("PooledProjector", POOLED, pooled),
    "pixel shuffle": ("SquareProjector", {**SQUARES, "hidden_size": 16}, shuffle),
    "perceiver": ("PerceiverResampler", RESAMPLED, perceiver),
}


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.4 * torch.randn(shape, generator=generator) + ("norm.weight" in name)


def build(kind: str, settings: dict[str, Any], tp: int) -> Any:
    import megatron.mimo.encoders as encoders

    groups = model_parallel(tp=tp)
    config = language_config(tensor_model_parallel_size=tp)
    return getattr(encoders, kind)(config, **settings, pg_collection=groups)


def run(kind: str, settings: dict[str, Any], tp: int) -> dict[str, Any]:
    """On each rank: outputs and gradients, with weights placed by the checkpoint's description."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    module = build(kind, settings, tp)
    shards = [s for s in module.sharded_state_dict().values() if isinstance(s, ShardedTensor)]
    shapes = {shard.key: tuple(shard.global_shape) for shard in shards}
    for shard in shards:
        shard.data.data.copy_(random(shard.key, shapes[shard.key])[shard.global_slice()])
    rows_NI = random("rows", (ROWS, INPUT)).requires_grad_()
    output = module(rows_NI)
    (output * random("weights", tuple(output.shape))).sum().backward()
    owners = {parameter.data_ptr(): parameter for parameter in module.parameters()}
    assert {shard.data.data_ptr() for shard in shards} == set(owners)
    return {
        "output": output.detach(),
        "rows": rows_NI.grad,
        "shapes": shapes,
        "parameters": [
            (shard.key, shard.global_slice(), owners[shard.data.data_ptr()].grad)
            for shard in shards
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_pytorch(ranks: RankPool, case: str, tp: int) -> None:
    kind, settings, reference = CASES[case]
    results = ranks(tp)(run, kind, settings, tp)
    weights = {
        key: random(key, shape).requires_grad_() for key, shape in results[0]["shapes"].items()
    }
    rows_NI = random("rows", (ROWS, INPUT)).requires_grad_()
    output = reference(rows_NI, weights)
    (output * random("weights", tuple(output.shape))).sum().backward()
    for result in results:
        torch.testing.assert_close(result["output"], output.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["rows"], rows_NI.grad, rtol=1e-4, atol=1e-4)
        for key, where, gradient in result["parameters"]:
            expected = weights[key].grad
            assert expected is not None
            torch.testing.assert_close(
                gradient, expected[where].reshape(gradient.shape), rtol=1e-4, atol=1e-4, msg=key
            )


def no_rows(tp: int) -> None:
    from megatron.core import parallel_state

    for kind, settings, _ in CASES.values():
        module = build(kind, settings, tp)
        rows_NI = torch.zeros(0, INPUT, requires_grad=True)
        output = module(rows_NI)
        assert output.shape == (0, OUTPUT)
        output.sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        parallel_state.destroy_model_parallel()


def test_no_rows_give_zero_gradients(ranks: RankPool) -> None:
    ranks(2)(no_rows, 2)


def refusals() -> None:
    from megatron.core import parallel_state

    for kind, settings, error, message in (
        ("Projector", {**WIDTHS, "num_layers": 0}, ConfigError, "projector of 0 layers"),
        ("Projector", {**WIDTHS, "hidden_size": 7}, ConfigError, r"\[8, 7, 12\] is split over 2"),
        ("Projector", {**WIDTHS, "activation": "x"}, UnsupportedError, "activation 'x'"),
        ("SquareProjector", {**SQUARES, "side": 3}, ConfigError, "4 x 6 rows is not divisible"),
        ("PooledProjector", {**POOLED, "side": 3}, ConfigError, "4 x 6 rows is not divisible"),
        ("SquareProjector", {**SQUARES, "norm": "x"}, ConfigError, "norm is 'x'; expected one"),
        ("PerceiverResampler", {**RESAMPLED, "num_queries": 0}, ConfigError, "num_queries=0"),
        (
            "PerceiverResampler",
            {**RESAMPLED, "num_attention_heads": 3},
            ConfigError,
            "3 attention heads are not divisible",
        ),
    ):
        with pytest.raises(error, match=message):
            build(kind, settings, 2)
        parallel_state.destroy_model_parallel()
    for kind, settings in (
        ("SquareProjector", SQUARES),
        ("PooledProjector", POOLED),
        ("PerceiverResampler", RESAMPLED),
    ):
        with pytest.raises(InputError, match=r"25 rows; expected a multiple of .*24"):
            build(kind, settings, 2)(torch.zeros(25, INPUT))
        parallel_state.destroy_model_parallel()


def test_refusals(ranks: RankPool) -> None:
    ranks(2)(refusals)
