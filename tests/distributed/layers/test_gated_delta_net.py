"""The gated delta net on one rank: transformers' layer, generation, half precision, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layers.delta_net_cases import (
    HIDDEN,
    SECTIONS,
    TAPS,
    G,
    K,
    R,
    V,
    assert_near,
    build,
    hidden_and_gradient,
    packed,
    whole_weights,
)
from tests.rank_pool import RankPool

# One process against transformers


def transformers_layer(weights: dict[str, Tensor]) -> Any:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    from megatron.mimo.layers.gated_delta_net import ungroup_rows

    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=G,
        linear_num_value_heads=G * R,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=TAPS,
        rms_norm_eps=1e-6,
    )
    theirs = Qwen3_5GatedDeltaNet(config, 0)
    q, k, v, z, b, a = ungroup_rows(weights["in_proj.weight"], SECTIONS, G)
    theirs.load_state_dict(
        {
            "in_proj_qkv.weight": torch.cat([q, k, v]),
            "in_proj_z.weight": z,
            "in_proj_b.weight": b,
            "in_proj_a.weight": a,
            "conv1d.weight": torch.cat(ungroup_rows(weights["conv1d.weight"], SECTIONS[:3], G)),
            "A_log": weights["A_log"],
            "dt_bias": weights["dt_bias"],
            "norm.weight": weights["norm.weight"],
            "out_proj.weight": weights["out_proj.weight"],
        }
    )
    return theirs


def their_gradients(theirs: Any) -> dict[str, Tensor]:
    from megatron.mimo.layers.gated_delta_net import group_rows

    found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    sizes = [G * K, G * K, G * R * V]
    inputs = [found.pop(f"in_proj_{name}.weight") for name in ("qkv", "z", "b", "a")]
    found["in_proj.weight"] = group_rows([*inputs[0].split(sizes), *inputs[1:]], G)
    found["conv1d.weight"] = group_rows(found["conv1d.weight"].split(sizes), G)
    return found


LENGTHS = [70, 1, 0, 64, 3, 130]


def against_transformers() -> None:
    layer, theirs = build(), transformers_layer(whole_weights())
    for lengths in (None, LENGTHS):
        tokens = 150 if lengths is None else sum(lengths)
        hidden, gradient = hidden_and_gradient(tokens, rows=1 if lengths else 2)
        results = []
        for model in (layer, theirs):
            model.zero_grad()
            leaf = hidden.clone().requires_grad_()
            if model is layer:
                out, _ = layer(leaf, packed_seq_params=packed(lengths) if lengths else None)
            else:
                rows = leaf.transpose(0, 1)
                documents = [row for row in rows.split(lengths or tokens, dim=1) if row.size(1)]
                out = torch.cat([theirs(row) for row in documents], dim=1).transpose(0, 1)
            out.backward(gradient)
            found = (
                {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
                if model is layer
                else their_gradients(theirs)
            )
            results.append({"output": out.detach(), "hidden": leaf.grad, **found})
        # Their sums of decays are rounded to fp32; ours against fp64: test_delta_rule.
        assert_near(*results, limit=1e-4)


def test_one_process_equals_transformers(ranks: RankPool) -> None:
    pytest.importorskip("transformers")
    ranks(1)(against_transformers)


# Generation


def generate(*, tp: int, padded_behind: bool) -> float:
    """Prompts of uneven lengths, then token by token, against whole rows; the largest error."""
    from megatron.core.inference.contexts import StaticInferenceContext

    layer = build(tp=tp).eval()
    lengths, P, answer = [9, 70, 2], 70, 5
    rows = hidden_and_gradient(P + answer, rows=len(lengths))[0].unbind(1)
    rows = [row[: length + answer] for row, length in zip(rows, lengths, strict=True)]
    expected = [layer(row[:, None])[0][:, 0] for row in rows]

    noise = torch.randn(P, len(rows), HIDDEN)
    padding_BP = torch.ones(len(rows), P, dtype=torch.bool)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(0, length) if padded_behind else slice(P - length, P)
        noise[place, index] = row[:length]
        padding_BP[index, place] = False
    context = StaticInferenceContext(len(rows), P + answer)
    got, _ = layer(noise, padding_BP[:, None, None], inference_context=context)
    outputs = [[got[~padding_BP[index], index]] for index in range(len(rows))]
    context.increment_sequence_len_offset(P)
    # Two tokens at once, the others one by one.
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5)):
        step = torch.stack(
            [
                row[length + start : length + stop]
                for row, length in zip(rows, lengths, strict=True)
            ],
            dim=1,
        )
        mask_BL = torch.cat([padding_BP, torch.zeros(len(rows), stop, dtype=torch.bool)], dim=1)[
            :, None, None
        ]
        got, _ = layer(step, mask_BL, inference_context=context)
        context.increment_sequence_len_offset(stop - start)
        for index in range(len(rows)):
            outputs[index].append(got[:, index])
    pairs = zip(outputs, expected, strict=True)
    return max(((torch.cat(got) - row).norm() / row.norm()).item() for got, row in pairs)


@pytest.mark.parametrize(("tp", "padded_behind"), [(1, True), (2, False)])
def test_generation_equals_whole_rows(ranks: RankPool, tp: int, padded_behind: bool) -> None:
    with torch.no_grad():
        for error in ranks(tp)(generate, tp=tp, padded_behind=padded_behind):
            assert error < 1e-5


def half_precision() -> tuple[float, float, set[torch.dtype]]:
    """The error of layer and transformers' layer in bf16, and the dtypes of the layer's cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    hidden, gradient = hidden_and_gradient(130)
    layer, theirs = build(), transformers_layer(whole_weights())
    outputs = []
    for model, dtype in (
        (layer, torch.float32),
        (layer, torch.bfloat16),
        (theirs, torch.bfloat16),
    ):
        model = model.to(dtype)
        leaf = hidden.clone().to(dtype).requires_grad_()
        out = layer(leaf)[0] if model is layer else theirs(leaf.transpose(0, 1)).transpose(0, 1)
        out.backward(gradient.to(dtype))
        outputs.append(torch.cat([out.detach(), leaf.grad]).float())
    exact, ours, others = outputs
    errors = [((one - exact).norm() / exact.norm()).item() for one in (ours, others)]
    context = StaticInferenceContext(1, 140)
    layer(hidden.bfloat16(), inference_context=context)
    return *errors, {one.dtype for one in context.key_value_memory_dict[1]}


def test_half_precision_errs_no_more_than_transformers(ranks: RankPool) -> None:
    pytest.importorskip("transformers")
    ((ours, theirs, kept),) = ranks(1)(half_precision)
    assert 0 < ours < 1.1 * theirs < 0.1
    assert kept == {torch.bfloat16, torch.float32}


def refusals() -> list[str]:
    layer, said = build(), []
    hidden = torch.zeros(4, 2, HIDDEN)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)
    for call in (
        lambda: layer(hidden, causal),
        lambda: layer(hidden, torch.zeros(2, 4, dtype=torch.int64)),
        lambda: layer(hidden, attention_bias=torch.zeros(1)),
        lambda: layer(hidden, packed_seq_params=packed([4])),
        lambda: layer(hidden[:, :1], packed_seq_params=packed([3, 2])),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def test_refusals(ranks: RankPool) -> None:
    (said,) = ranks(1)(refusals)
    for message, words in zip(
        said,
        (
            "UnsupportedError: attention_mask is torch.bool of shape [1, 1, 4, 4]",
            "UnsupportedError: attention_mask is torch.int64 of shape [2, 4]",
            "UnsupportedError: attention_bias",
            "InputError: a packed micro-batch has 2 rows",
            "InputError: boundaries of packed documents are [0, 3, 5] for a row of 4",
        ),
        strict=True,
    ):
        assert message.startswith(words)
