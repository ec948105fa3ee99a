"""The core attention on one rank against its definition: output and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.models.mimo.errors import ConfigError, InputError, UnsupportedError
from tests.attention_oracle import (
    assert_equal,
    attention_by_definition,
    make_inputs,
    packed_pairs,
    pairs,
)

D = 16
LONG = 300  # more than one block of queries

SPANS = torch.tensor([0] * 3 + [4] * 6 + [0] * 280 + [9] * 8 + [0] * 3)


def build(mask_type: str = "causal", heads: tuple[int, int] = (4, 4), **changes: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import CoreAttention

    init = {name: changes.pop(name) for name in ("softmax_scale",) if name in changes}
    settings = {
        "num_layers": 2,
        "hidden_size": heads[0] * D,
        "num_attention_heads": heads[0],
        "num_query_groups": heads[1],
        "attention_dropout": 0.0,
        "transformer_impl": "local",
    }
    config = TransformerConfig(**(settings | changes))
    return CoreAttention(config, 1, AttnMaskType[mask_type], "self", **init)


def run(module: Any, inputs: tuple[Tensor, ...], mask: Tensor | None, **call: Any) -> list[Tensor]:
    """Output and gradients of the module; 3-D call where ``packed_seq_params`` is given."""
    *leaves, gradient = inputs
    q, k, v = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    packed = call.get("packed_seq_params") is not None
    out = module(*((leaf.squeeze(1) if packed else leaf) for leaf in (q, k, v)), mask, **call)
    out = out.unsqueeze(1) if packed else out
    out.backward(gradient)
    return [out.detach(), q.grad, k.grad, v.grad]


def causal(i: int, j: int) -> bool:
    return j <= i


def full(i: int, j: int) -> bool:
    return True


@pytest.fixture(params=["fused", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's kernel, and the one of plain torch that CUDA uses for masks and fp32."""
    if request.param == "plain":
        from megatron.mimo.layers.attention import kernels as attention_kernels

        monkeypatch.setattr(attention_kernels, "_kernel", lambda *_: "plain")
    return str(request.param)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(("mask_type", "rule"), [("causal", causal), ("no_mask", full)])
def test_dense(heads: tuple[int, int], mask_type: str, rule: Any) -> None:
    inputs = make_inputs(37, 2, heads, D)
    seen = pairs(37, 37, rule).expand(2, -1, -1)
    results = run(build(mask_type, heads), inputs, None)
    assert_equal(results, attention_by_definition(inputs, seen), 1e-5)


@pytest.mark.parametrize(
    ("mask_type", "window", "rule"),
    [
        ("causal", (7, 3), lambda i, j: i - 7 <= j <= i),
        ("causal", (-1, 0), causal),
        ("no_mask", (5, 9), lambda i, j: i - 5 <= j <= i + 9),
        ("no_mask", (-1, 9), lambda i, j: j <= i + 9),
    ],
)
def test_sliding_window(kernel: str, mask_type: str, window: Any, rule: Any) -> None:
    inputs = make_inputs(LONG, 1, (2, 1), D)
    module = build(mask_type, (2, 1), window_size=window)
    seen = pairs(LONG, LONG, rule)[None]
    assert_equal(run(module, inputs, None), attention_by_definition(inputs, seen), 1e-5)


def test_a_window_may_skip_layers() -> None:
    inputs = make_inputs(20, 1, (2, 2), D)
    module = build("causal", (2, 2), window_size=(2, 0), window_attn_skip_freq=1)
    seen = pairs(20, 20, causal)[None]
    assert_equal(run(module, inputs, None), attention_by_definition(inputs, seen), 1e-5)


@pytest.mark.parametrize("window", [None, (7, 0)], ids=["causal", "window"])
def test_spans_are_bidirectional(kernel: str, window: tuple[int, int] | None) -> None:
    spans = torch.stack([SPANS, SPANS.roll(5)]).int()
    inputs = make_inputs(LONG, 2, (2, 1), D)
    behind = LONG if window is None else window[0]

    def rule(b: int) -> Tensor:
        of = spans[b].tolist()
        return pairs(LONG, LONG, lambda i, j: i - behind <= j <= i or (of[i] == of[j] > 0))

    expected = attention_by_definition(inputs, torch.stack([rule(0), rule(1)]))
    module = build("causal", (2, 1), window_size=window)
    assert_equal(run(module, inputs, spans), expected, 1e-5)


def test_an_explicit_mask_replaces_the_causal_rule() -> None:
    inputs = make_inputs(21, 2, (4, 2), D)
    masked = torch.rand(2, 1, 21, 21, generator=torch.Generator().manual_seed(3)) < 0.6
    masked[1, :, 4] = True  # a query that sees nothing
    results = run(build("causal", (4, 2)), inputs, masked)
    assert_equal(results, attention_by_definition(inputs, ~masked[:, 0]), 1e-5)
    assert results[0][4, 1].abs().max() == 0


@pytest.mark.parametrize(
    ("mask_type", "rule"),
    [("causal", causal), ("padding", full), ("padding_causal", causal), ("arbitrary", full)],
)
def test_padded_keys(mask_type: str, rule: Any) -> None:
    inputs = make_inputs(21, 2, (4, 2), D)
    padded = torch.zeros(2, 1, 1, 21, dtype=torch.bool)
    padded[0, ..., 15:] = True
    padded[1, ..., :2] = True
    seen = pairs(21, 21, rule) & ~padded[:, 0]
    results = run(build("no_mask", (4, 2)), inputs, padded, attn_mask_type=mask(mask_type))
    assert_equal(results, attention_by_definition(inputs, seen), 1e-5)


def mask(name: str) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType[name]


def test_bias_with_mask_and_causal_rule() -> None:
    inputs = make_inputs(21, 2, (4, 2), D)
    bias = torch.randn(2, 4, 21, 21, generator=torch.Generator().manual_seed(5))
    padded = torch.zeros(2, 1, 1, 21, dtype=torch.bool)
    padded[0, ..., 3] = True
    seen = pairs(21, 21, causal) & ~padded[:, 0]
    results = run(build("causal", (4, 2)), inputs, padded, attention_bias=bias)
    assert_equal(results, attention_by_definition(inputs, seen, bias_BHSK=bias), 1e-5)


def test_scale_value_size_and_cross_lengths() -> None:
    inputs = make_inputs(9, 2, (4, 2), D, K=23, D_value=24)
    module = build("no_mask", (4, 2), softmax_scale=0.3, apply_query_key_layer_scaling=True)
    expected = attention_by_definition(inputs, torch.ones(2, 9, 23, dtype=torch.bool), scale=0.3)
    assert_equal(run(module, inputs, None), expected, 1e-5)


def test_one_query_sees_all_keys() -> None:
    inputs = make_inputs(1, 2, (4, 2), D, K=23)
    expected = attention_by_definition(inputs, torch.ones(2, 1, 23, dtype=torch.bool))
    assert_equal(run(build("causal", (4, 2)), inputs, None), expected, 1e-5)


def packed_params(lengths: list[int], places: list[int] | None = None) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    def sums(values: list[int] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.tensor([0, *itertools.accumulate(values)], dtype=torch.int32)

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sums(lengths),
        cu_seqlens_kv=sums(lengths),
        cu_seqlens_q_padded=sums(places),
        cu_seqlens_kv_padded=sums(places),
        max_seqlen_q=max(places or lengths),
        max_seqlen_kv=max(places or lengths),
    )


@pytest.mark.parametrize(
    ("lengths", "places", "tokens"),
    [([7, 1, 22], None, 30), ([7, 0, 22], [10, 2, 22], 40)],
    ids=["tight", "padded"],
)
@pytest.mark.parametrize(("mask_type", "rule"), [("causal", causal), ("padding", full)])
def test_packed(
    kernel: str, lengths: list[int], places: Any, tokens: int, mask_type: str, rule: Any
) -> None:
    inputs = make_inputs(tokens, 1, (4, 2), D)
    seen = packed_pairs(lengths, places or lengths, tokens, rule)
    results = run(
        build(mask_type, (4, 2)), inputs, None, packed_seq_params=packed_params(lengths, places)
    )
    assert_equal(results, attention_by_definition(inputs, seen), 1e-5)


def test_packed_with_window_and_spans(kernel: str) -> None:
    lengths, tokens = [40, LONG, 5], LONG + 45
    inputs = make_inputs(tokens, 1, (2, 1), D)
    spans = torch.zeros(1, tokens, dtype=torch.long)
    spans[0, 30:50] = 3  # crosses a boundary: documents stay apart
    of = spans[0, 40:].tolist(), spans[0].tolist()

    def rule(document: int) -> Any:
        span = of[1] if document == 0 else of[0]
        return lambda i, j: i - 6 <= j <= i or (span[i] == span[j] > 0)

    seen = packed_pairs(lengths, lengths, tokens, rule(0))
    seen[0, 40:] = packed_pairs(lengths, lengths, tokens, rule(1))[0, 40:]
    seen[0, 40 + LONG :] = packed_pairs(lengths, lengths, tokens, lambda i, j: j <= i)[
        0, 40 + LONG :
    ]
    module = build("causal", (2, 1), window_size=(6, 0))
    results = run(module, inputs, spans, packed_seq_params=packed_params(lengths))
    assert_equal(results, attention_by_definition(inputs, seen), 1e-5)


def test_packed_cross_attention() -> None:
    params = packed_params([4, 9])
    params.cu_seqlens_kv = torch.tensor([0, 11, 13])
    inputs = make_inputs(13, 1, (4, 2), D)
    seen = torch.zeros(1, 13, 13, dtype=torch.bool)
    seen[0, :4, :11] = seen[0, 4:, 11:] = True
    results = run(build("no_mask", (4, 2)), inputs, None, packed_seq_params=params)
    assert_equal(results, attention_by_definition(inputs, seen), 1e-5)
    with pytest.raises(InputError, match="differ in length"):
        run(build("causal", (4, 2)), inputs, None, packed_seq_params=params)


@pytest.mark.parametrize("case", ["dense", "window", "packed"])
def test_bf16(kernel: str, case: str) -> None:
    inputs = make_inputs(90, 1, (4, 2), D)
    half = tuple(tensor.bfloat16() for tensor in inputs)
    window = (7, 0) if case == "window" else None
    params = packed_params([30, 60]) if case == "packed" else None
    behind = 90 if window is None else 7
    places = [30, 60] if case == "packed" else [90]
    seen = packed_pairs(places, places, 90, lambda i, j: i - behind <= j <= i)
    expected = attention_by_definition(half, seen)
    module = build("causal", (4, 2), window_size=window, bf16=True, params_dtype=torch.bfloat16)
    results = run(module, half, None, packed_seq_params=params)
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert_equal(results, expected, 1e-2)


def test_dropped_weights_are_the_same_in_forward_and_backward() -> None:
    from megatron.mimo.layers.attention.paths import Rule, dense_attention
    from megatron.mimo.layers.attention.visibility import Visibility

    S, B, H = LONG, 2, 4
    inputs = make_inputs(S, B, (H, 2), D)
    rule = Rule(visibility=Visibility.of(causal=True), scale=D**-0.5, dropout=0.25)
    weights_BHSK = torch.empty(B, H, S, S)
    eye = torch.eye(S)
    for start in range(0, S, D):  # values that show D columns of the weights at a time
        columns = torch.zeros(S, D)
        columns[:, : len(eye[start : start + D])] = eye[start : start + D].T
        values = columns[:, None, None].expand(S, B, 2, D)
        torch.manual_seed(11)
        out = dense_attention(inputs[0], inputs[1], values, rule)
        weights_BHSK[..., start : start + D] = out.permute(1, 2, 0, 3)[..., : min(D, S - start)]
    seen = pairs(S, S, causal)
    kept_BHSK = (weights_BHSK > 0) / 0.75
    assert abs((kept_BHSK == 0)[..., seen].float().mean() - 0.25) < 5e-3
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    torch.manual_seed(11)
    out = dense_attention(q, k, v, rule).flatten(2)
    after = torch.get_rng_state()
    out.backward(inputs[3])
    assert torch.equal(torch.get_rng_state(), after)  # the backward pass draws nothing new
    expected = attention_by_definition(inputs, seen.expand(B, -1, -1), kept_BHSK=kept_BHSK)
    assert_equal([out.detach(), q.grad, k.grad, v.grad], expected, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_type": "off-by-one"}, "softmax_type is 'off-by-one'"),
        ({"qk_clip": True}, "qk_clip is True"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit is True"),
        ({"fp8_dot_product_attention": True}, "fp8_dot_product_attention is True"),
        ({"flash_attention_version": 3}, "flash_attention_version is 3"),
    ],
)
def test_refuses_settings_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_refuses_what_it_cannot_combine() -> None:
    q, k, v, _ = make_inputs(8, 2, (4, 2), D)
    dense = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    packed = [tensor[:, 0] for tensor in (q, k, v)]
    module = build("causal", (4, 2))
    with pytest.raises(UnsupportedError, match=r"attention_mask of shape .* packed"):
        module(*packed, dense, packed_seq_params=packed_params([8]))
    with pytest.raises(UnsupportedError, match="attn_mask_type is causal_bottom_right"):
        module(q, k, v, None, attn_mask_type=mask("causal_bottom_right"))
    with pytest.raises(InputError, match=r"torch.float32 of shape \[1, 1, 8, 8\]"):
        module(q, k, v, dense.float())
    with pytest.raises(InputError, match=r"span numbers .* expected \[2, 8\]"):
        module(q, k, v, torch.zeros(2, 9, dtype=torch.int))
    with pytest.raises(InputError, match=r"query \[8, 2, 4, 16\]"):
        module(q, k[:, :1], v[:, :1], None)
    with pytest.raises(InputError, match="8 queries over 5 keys"):
        module(q, k[:5], v[:5], None)


@pytest.mark.parametrize(
    ("sums", "padded", "message"),
    [
        (None, None, "cu_seqlens_q is None"),
        ([0, 5, 9], None, "covers 9 tokens, but the row has 8"),
        ([1, 8], None, r"cu_seqlens_q is \[1, 8\]"),
        ([0, 5, 4], None, r"cu_seqlens_q is \[0, 5, 4\]"),
        ([0, 5, 8], [0, 4, 8], "document 0 has 5 tokens .* place for 4"),
        ([0, 5, 8], [0, 8], "2 documents and cu_seqlens_q_padded 1"),
    ],
)
def test_refuses_boundaries_that_do_not_fit(sums: Any, padded: Any, message: str) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    q, k, v, _ = make_inputs(8, 1, (4, 2), D)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=None if sums is None else torch.tensor(sums),
        cu_seqlens_q_padded=None if padded is None else torch.tensor(padded),
    )
    with pytest.raises(InputError, match=message):
        build("causal", (4, 2))(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=params)


@pytest.mark.parametrize("case", ["dense", "window", "packed"])
def test_never_waits_for_the_device(case: str) -> None:
    from megatron.mimo.backend.host_sync import HostSyncCounter

    inputs = make_inputs(90, 1, (4, 2), D)
    module = build("causal", (4, 2), window_size=(7, 0) if case == "window" else None)
    params = packed_params([30, 60]) if case == "packed" else None
    with HostSyncCounter() as counter:
        run(module, inputs, None, packed_seq_params=params)
    assert counter.total == 0, counter.counts
