"""Tiles merged by their log-sum-exp, on every kernel; the core attention on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention_oracle import (
    assert_equal,
    attention_by_definition,
    make_inputs,
    packed_pairs,
    pairs,
)

D = 16

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_tiles_over_different_keys_merge(device: str, dtype: torch.dtype) -> None:
    """Causal attention as two blocks of queries: three tiles, two of them for the second."""
    from megatron.mimo.layers.attention.context_parallel import Tiling, attend_tiles
    from megatron.mimo.layers.attention.tiles import Plan, Tile
    from megatron.mimo.layers.attention.visibility import Visibility

    S, B, H, G = 96, 2, 4, 2
    early, late = slice(0, 32), slice(32, 96)
    tiles = (
        Tile(q=early, k=early, causal=True),
        Tile(q=late, k=early),
        Tile(q=late, k=late, causal=True, first=False),
    )
    how = Tiling(
        plan=Plan(steps=(tiles,), single=False), visibility=Visibility(ahead=0), scale=D**-0.5
    )
    inputs = tuple(tensor.to(device, dtype) for tensor in make_inputs(S, B, (H, G), D))
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    out = attend_tiles(
        q.view(S, B * G, H // G, D), k.view(S, B * G, D), v.view(S, B * G, D), how
    ).reshape(S, B, H * D)
    out.backward(inputs[3])
    results = [tensor.cpu() for tensor in (out.detach(), q.grad, k.grad, v.grad)]
    seen = pairs(S, S, lambda i, j: j <= i).expand(B, -1, -1)
    expected = attention_by_definition(tuple(tensor.cpu() for tensor in inputs), seen)
    assert_equal(results, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, (7, 0)], ids=["causal", "window"])
@pytest.mark.parametrize("padded", [None, [40, 60]], ids=["tight", "padded"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_on_a_gpu(dtype: torch.dtype, window: Any, padded: Any, packed: bool) -> None:
    from tests.unit.mimo.layers.attention.test_core_attention import build, packed_params, run

    if padded and not packed:
        pytest.skip("padding between documents is of packed sequences")
    places = (padded or [30, 60]) if packed else [90]
    lengths = [30, 60] if packed else [90]
    inputs = make_inputs(sum(places), 1, (4, 2), D)
    half = tuple(tensor.to("cuda", dtype) for tensor in inputs)
    params = packed_params(lengths, padded) if packed else None
    for name, value in vars(params).items() if params is not None else ():
        if isinstance(value, torch.Tensor):
            setattr(params, name, value.cuda())
    behind = 90 if window is None else 7
    seen = packed_pairs(lengths, places, sum(places), lambda i, j: i - behind <= j <= i)
    half[3][~seen[0].any(1)] = 0  # the loss does not look at padding
    module = build("causal", (4, 2), window_size=window)
    results = [result.cpu() for result in run(module, half, None, packed_seq_params=params)]
    results[0][~seen[0].any(1)] = 0
    expected = attention_by_definition(tuple(tensor.cpu() for tensor in half), seen)
    assert_equal(results, expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [577, 64])
def test_cudnn_equals_another_kernel(rows: int) -> None:
    """Where it is taken: an encoder's heads, views of what queries, keys and values share."""
    from megatron.mimo.layers.attention.cudnn import prefers_cudnn
    from megatron.mimo.layers.attention.paths import Rule, dense_attention
    from megatron.mimo.layers.attention.visibility import Visibility

    generator = torch.Generator("cuda").manual_seed(1)
    drawn = torch.randn(rows, 3, 4, 3 * 64, generator=generator, device="cuda")
    mixed = drawn.bfloat16().requires_grad_()
    q, k, v = mixed.split(64, dim=-1)
    rule = Rule(visibility=Visibility(), scale=0.2)
    wide = mixed.detach().float().requires_grad_()
    expected = dense_attention(*wide.split(64, dim=-1), rule)
    if torch.cuda.get_device_capability()[0] in (9, 10):
        assert prefers_cudnn(*(one.permute(1, 2, 0, 3) for one in (q, k, v)), 0.0)
    found = dense_attention(q, k, v, rule)
    grads = []
    for out, leaf in ((found, mixed), (expected, wide)):
        out.float().square().sum().backward()
        grads.append(leaf.grad.float())
    for got, want in ((found.float(), expected), grads):
        assert (got - want).norm() / want.norm() < 1e-2


@pytest.mark.gpu
def test_boundaries_are_copied_to_the_host_once() -> None:
    from megatron.mimo.layers.attention import packed_lengths

    sums = torch.tensor([0, 5, 9], device="cuda")
    assert packed_lengths._read(sums) == [0, 5, 9]
    assert packed_lengths._read(sums) is packed_lengths._read(sums)
    sums[1] = 4
    assert packed_lengths._read(sums) == [0, 4, 9]


KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        "query key value dropout_p is_causal attn_mask scale",
        "output logsumexp",
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
        "grad_query grad_key grad_value",
    ),
    "_scaled_dot_product_flash_attention": (
        "query key value dropout_p is_causal return_debug_mask scale",
        "output logsumexp cum_seq_q cum_seq_k max_q max_k rng_state unused debug_attn_mask",
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal philox_seed philox_offset scale",
        "grad_query grad_key grad_value",
    ),
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
        "output logsumexp cum_seq_q cum_seq_k max_q max_k philox_seed philox_offset "
        "debug_attn_mask",
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_and_return_what_is_passed(name: str) -> None:
    """They are torch's own business, and a new torch may change them: CUDA's too, seen on CPU."""
    schema = getattr(torch.ops.aten, name).default._schema
    arguments = " ".join(argument.name for argument in schema.arguments)
    results = " ".join(result.name for result in schema.returns)
    assert (arguments, results) == KERNELS[name]
