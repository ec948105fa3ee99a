"""The gated delta net against transformers' on one rank, and on several ranks against one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.rank_pool import RankPool, model_parallel

HIDDEN, G, R, K, V, TAPS = 24, 4, 2, 8, 6, 4
SECTIONS = [K, K, R * V, R * V, R, R]  # query, key, values, gate, strength, decay of a key head


def build(*, tp: int = 1, cp: int = 1, **settings: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers.gated_delta_net import gated_delta_net_spec

    groups = model_parallel(tp=tp, cp=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        linear_num_key_heads=G,
        linear_num_value_heads=G * R,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=TAPS,
        layernorm_epsilon=1e-6,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        **settings,
    )
    spec = gated_delta_net_spec(with_transformer_engine=False)
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    layer.load_state_dict(
        {name: own_part(layer, name, whole) for name, whole in whole_weights().items()}
    )
    return layer


def whole_weights() -> dict[str, Tensor]:
    """Of one process, in the layer's order; some heads forget much, some little."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "in_proj.weight": (G * sum(SECTIONS), HIDDEN),
        "conv1d.weight": (G * sum(SECTIONS[:3]), 1, TAPS),
        "A_log": (G * R,),
        "dt_bias": (G * R,),
        "norm.weight": (V,),
        "out_proj.weight": (HIDDEN, G * R * V),
    }
    weights = {
        name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    weights["A_log"] = torch.linspace(-6, 2, G * R)
    return weights


def own_part(layer: Any, name: str, whole: Tensor) -> Tensor:
    parameter = layer.get_parameter(name)
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    group = layer.tp_group
    return whole.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]


def hidden_and_gradient(tokens: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randn(2, tokens, rows, HIDDEN, generator=generator)
    return both[0], both[1]


def packed(lengths: Sequence[int]) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    sums = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=sums, cu_seqlens_kv=sums)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = ((got[name] - tensor).norm() / tensor.norm()).item()
        assert error < limit, f"{name}: relative error {error:.1e}"


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


# Several processes against one


def step(
    *, tp: int = 1, cp: int = 1, lengths: list[int] | None = None, **settings: Any
) -> dict[str, Tensor]:
    """Output and gradients of whole rows, and of whole weights."""
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    layer = build(tp=tp, cp=cp, **settings)
    tokens = sum(lengths or [96])
    hidden, gradient = hidden_and_gradient(tokens, rows=1 if lengths else 2)
    params = packed(lengths) if lengths else None
    is_cut = settings.get("sequence_parallel", False)
    cut = SequenceCut(
        cp_rank=layer.pg_collection.cp.rank(),
        cp_size=cp,
        tp_rank=layer.tp_group.rank() if is_cut else 0,
        tp_size=tp if is_cut else 1,
        places=params.cu_seqlens_q if params else None,
    )
    leaf = cut.rank_share(hidden, 0).clone().requires_grad_()
    out, _ = layer(leaf, packed_seq_params=params)
    out.backward(cut.rank_share(gradient, 0))
    found = {"output": out.detach(), "hidden": leaf.grad}
    if is_cut:
        found = {
            name: gather_from_sequence_parallel_region(one, group=layer.tp_group)
            for name, one in found.items()
        }
    if cp > 1:
        order = torch.cat(
            [cut.of_rank(cp_rank=r, tp_rank=0).context_positions(tokens) for r in range(cp)]
        ).argsort()
        found = {
            name: torch.cat(gathered(one, layer.cp_group))[order] for name, one in found.items()
        }
    for name, parameter in layer.named_parameters():
        found[name] = whole_gradient(parameter, layer)
    return found


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def whole_gradient(parameter: Any, layer: Any) -> Tensor:
    """As Megatron's training makes it: summed over tokens, and over what ranks share."""
    gradient = parameter.grad.clone()
    if layer.cp_group is not None:
        dist.all_reduce(gradient, group=layer.cp_group)
    if layer.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient, group=layer.tp_group)
    if getattr(parameter, "tensor_model_parallel", False):
        return torch.cat(gathered(gradient, layer.tp_group), dim=parameter.partition_dim)
    return gradient


PLACES = [16, 8, 64, 0, 8]


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"tp": 2, "sequence_parallel": True, "lengths": PLACES},
        {"cp": 2},
        {"cp": 4, "lengths": PLACES},
        {"tp": 2, "cp": 2, "sequence_parallel": True, "lengths": [16, 8, 72]},
    ],
    ids=lambda layout: "-".join(f"{name}{layout[name]}" for name in layout if name != "lengths"),
)
def test_ranks_equal_one_process(ranks: RankPool, layout: dict[str, Any]) -> None:
    (expected,) = ranks(1)(step, lengths=layout.get("lengths"))
    size = layout.get("tp", 1) * layout.get("cp", 1)
    for got in ranks(size)(step, **layout):
        assert_near(got, expected, limit=1e-5)
