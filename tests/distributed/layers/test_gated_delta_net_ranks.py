"""The gated delta net on several ranks against one, alone, in a model and in checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.layers.delta_net_cases import (
    assert_near,
    build,
    gathered,
    hidden_and_gradient,
    packed,
    whole_weights,
)
from tests.rank_pool import RankPool, model_parallel


def step(
    *,
    tp: int = 1,
    cp: int = 1,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> dict[str, Tensor]:
    """Output and gradients of whole rows, and of whole weights."""
    from megatron.core.models.mimo.alignment.cut import SequenceCut
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    layer = build(tp=tp, cp=cp, **settings).to(dtype)
    tokens = sum(lengths or [96])
    both = hidden_and_gradient(tokens, rows=1 if lengths else 2)
    hidden, gradient = (one.to(dtype) for one in both)
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
LONG = [256, 0, 384, 384]


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


@pytest.mark.parametrize(
    "layout",
    [{"cp": 2}, {"cp": 4, "lengths": LONG}, {"tp": 2, "cp": 2, "lengths": LONG}],
    ids=["cp2", "cp4-packed", "tp2-cp2-packed"],
)
def test_states_are_passed_exactly(ranks: RankPool, layout: dict[str, Any]) -> None:
    """Of long documents; in fp64 nothing but the exchange could make a difference."""
    (expected,) = ranks(1)(step, lengths=layout.get("lengths"), dtype=torch.float64)
    size = layout.get("tp", 1) * layout["cp"]
    for got in ranks(size)(passes_states, **layout):
        assert got
    for got in ranks(size)(step, **layout, dtype=torch.float64):
        assert_near(got, expected, limit=1e-11)
    for got in ranks(size)(step, **layout):
        assert_near({name: one.double() for name, one in got.items()}, expected, limit=1e-5)


def passes_states(*, cp: int, tp: int = 1, lengths: list[int] | None = None) -> bool:
    """Whether the layer passes states, of rows of 96 tokens or of documents; in fp32."""
    from megatron.mimo.layers.gated_delta_net.documents import documents_of
    from megatron.mimo.layers.gated_delta_net.states_over_ranks import pieces_of

    layer = build(tp=tp, cp=cp)
    tokens = sum(lengths or [96])
    params = packed(lengths) if lengths else None
    pieces = pieces_of(
        tokens=tokens,
        documents=documents_of(params, tokens=tokens, device=torch.device("cpu")),
        sizes=layer.sizes,
        dtype=torch.float32,
        group=layer.cp_group,
    )
    return pieces is not None


def test_heads_are_exchanged_of_short_documents(ranks: RankPool) -> None:
    for lengths in ([16, 8, 72], PLACES, [260, 8, 264], [6, 300]):
        assert ranks(2)(passes_states, cp=2, lengths=lengths) == [False] * 2


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
