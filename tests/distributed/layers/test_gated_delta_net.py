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
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sums,
        cu_seqlens_kv=sums,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


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


# In a model


def train_gpt(
    tp: int = 1, cp: int = 1, documents: tuple[int, ...] = (), **settings: Any
) -> dict[str, Tensor]:
    """Loss and whole gradients of a GPT with one layer of each kind, by Megatron's own means."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from tests.distributed.tiny_gpt import SEQUENCE, VOCABULARY, build_gpt

    groups = model_parallel(tp=tp, cp=cp)
    model = build_gpt(
        tp,
        linear_layers=(0,),
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=4,
        context_parallel_size=cp,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        **settings,
    )
    generator = torch.Generator().manual_seed(0)
    rows = 1 if documents else 2
    ids_BS, labels_BS = torch.randint(VOCABULARY, (2, rows, SEQUENCE), generator=generator)
    positions_BS = torch.arange(SEQUENCE).expand(rows, -1)
    params = packed(documents) if documents else None
    cut = SequenceCut(
        cp_rank=groups.cp.rank(), cp_size=cp, places=params.cu_seqlens_q if params else None
    )
    ids_BS, positions_BS, labels_BS = (
        cut.context_share(one) for one in (ids_BS, positions_BS, labels_BS)
    )
    named = {"packed_seq_params": params} if params else {}
    loss = model(ids_BS, positions_BS, None, labels=labels_BS, **named).sum()
    loss.backward()
    finalize_model_grads([model])
    dist.all_reduce(loss, group=groups.cp)
    found = {"loss": loss.detach().reshape(1)}
    for name, parameter in model.module.named_parameters():
        gradient = parameter.main_grad.clone() * cp  # which averages over context parallelism
        if getattr(parameter, "tensor_model_parallel", False):
            gradient = torch.cat(gathered(gradient, groups.tp), dim=parameter.partition_dim)
        found[name] = gradient
    return found


def test_in_a_model_with_recomputation_on_ranks(ranks: RankPool) -> None:
    whole = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    documents = (8, 4, 4)
    (expected,) = ranks(1)(train_gpt)
    assert sum("self_attention.in_proj" in name for name in expected) == 1
    for got in ranks(2)(train_gpt, 2, **whole):
        assert_near(got, expected, limit=1e-5)
    (expected,) = ranks(1)(train_gpt, documents=documents)
    for got in ranks(2)(train_gpt, cp=2, documents=documents, **whole):
        assert_near(got, expected, limit=1e-5)


def checkpoint_slices(tp: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]]:
    """Name -> whole shape, where this rank's part begins, and its replica."""
    sharded = build(tp=tp).sharded_state_dict(prefix="layer.")
    return {
        one.key: (tuple(one.global_shape), tuple(one.global_offset), one.replica_id)
        for one in sharded.values()
        if hasattr(one, "local_shape")
    }


def test_checkpoints_are_cut_by_heads(ranks: RankPool) -> None:
    first, second = ranks(2)(checkpoint_slices, 2)
    weights = whole_weights()
    assert first.keys() == {f"layer.{name}" for name in weights}
    for name, whole in weights.items():
        shape, start, replica = second[f"layer.{name}"]
        assert shape == tuple(whole.shape)
        assert first[f"layer.{name}"][1] == (0,) * whole.dim()
        if name == "norm.weight":
            assert (start, replica != first[f"layer.{name}"][2]) == ((0,), True)
        else:
            cut = 1 if name == "out_proj.weight" else 0
            expected = [0] * whole.dim()
            expected[cut] = whole.size(cut) // 2
            assert start == tuple(expected)


def half_precision() -> tuple[float, set[torch.dtype]]:
    """The relative error of the layer in bf16, and the dtypes of its cache."""
    from megatron.core.inference.contexts import StaticInferenceContext

    hidden, gradient = hidden_and_gradient(130)
    layer, outputs = build(), []
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer.to(dtype)
        leaf = hidden.clone().to(dtype).requires_grad_()
        out, _ = layer(leaf)
        out.backward(gradient.to(dtype))
        outputs.append(torch.cat([out.detach(), leaf.grad]).float())
    context = StaticInferenceContext(1, 140)
    layer(hidden.bfloat16(), inference_context=context)
    kept = {one.dtype for one in context.key_value_memory_dict[1]}
    return ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item(), kept


def test_half_precision(ranks: RankPool) -> None:
    ((error, kept),) = ranks(1)(half_precision)
    assert 0 < error < 0.02
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
