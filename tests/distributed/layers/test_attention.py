"""Context parallelism of the core attention, and of a whole GPT on it, against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.attention_oracle import (
    assert_equal,
    attention_by_definition,
    make_inputs,
    packed_pairs,
)
from tests.rank_pool import RankPool, model_parallel

D = 16


@dataclass(kw_only=True)
class Case:
    """One attention: documents in places (one place is the dense case when not ``packed``)."""

    places: list[int]
    lengths: list[int] | None = None
    packed: bool = True
    batch: int = 1
    causal: bool = True
    window: tuple[int, int] | None = None
    span: tuple[int, int] | None = None
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float32
    tail: int = 0
    inputs: Any = field(init=False)

    def __post_init__(self) -> None:
        inputs = make_inputs(sum(self.places) + self.tail, self.batch, self.heads, D)
        self.inputs = tuple(tensor.to(self.dtype) for tensor in inputs)

    def spans(self) -> Tensor | None:
        if self.span is None:
            return None
        spans_BS = torch.zeros(self.batch, len(self.inputs[0]), dtype=torch.int32)
        for b in range(self.batch):
            spans_BS[b, self.span[0] + b : self.span[1] + b] = 1
        return spans_BS

    def expected(self) -> list[Tensor]:
        far = sum(self.places)
        left, right = self.window or (far, far)
        tokens = len(self.inputs[0])
        near = packed_pairs(
            self.lengths or self.places,
            self.places,
            tokens,
            lambda i, j: i - left <= j <= (i if self.causal else i + right),
        )
        seen = near.repeat(self.batch, 1, 1)
        if self.span is not None:
            spans = self.spans()
            same = packed_pairs(self.places, self.places, tokens, lambda i, j: True)
            seen |= same & (spans[:, :, None] == spans[:, None, :]) & (spans[:, :, None] > 0)
        return attention_by_definition(self.inputs, seen)


def positions_of(rank: int, size: int, places: list[int], tail: int = 0) -> list[int]:
    """Where the tokens of a rank are in the row: of each document its chunks r and 2*cp-1-r."""
    held, start = [], 0
    for place in places:
        chunk = place // (2 * size)
        for piece in (rank, 2 * size - 1 - rank):
            held += range(start + piece * chunk, start + (piece + 1) * chunk)
        start += place
    return held + list(range(start + rank * tail // size, start + (rank + 1) * tail // size))


def attend_on_ranks(cases: list[Case], *, size: int) -> list[list[Tensor]]:
    """Every rank's output and gradients of each case."""
    groups = model_parallel(cp=size)
    return [attend_case(case, groups, size) for case in cases]


def attend_case(case: Case, groups: Any, size: int) -> list[Tensor]:
    import itertools

    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import CoreAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.heads[0] * D,
        num_attention_heads=case.heads[0],
        num_query_groups=case.heads[1],
        attention_dropout=0.0,
        context_parallel_size=size,
        window_size=case.window,
        transformer_impl="local",
    )
    mask_type = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
    module = CoreAttention(config, 1, mask_type, "self", pg_collection=groups)
    held = positions_of(groups.cp.rank(), size, case.places, case.tail)
    *leaves, gradient = (tensor[held] for tensor in case.inputs)
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    spans = case.spans()
    spans = None if spans is None else spans[:, held]
    if not case.packed:
        out = module(q, k, v, spans)
    else:
        sums, padded = (
            torch.tensor([0, *itertools.accumulate(values)], dtype=torch.int32)
            for values in (case.lengths or case.places, case.places)
        )
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=sums,
            cu_seqlens_kv=sums,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
        )
        out = module(*(leaf[:, 0] for leaf in (q, k, v)), spans, packed_seq_params=packed)
        out = out.unsqueeze(1)
    out.backward(gradient)
    return [out.detach(), q.grad, k.grad, v.grad]


CASES = {
    "dense causal": Case(places=[48], packed=False, batch=2),
    "dense full MQA": Case(places=[48], packed=False, batch=2, causal=False, heads=(4, 1)),
    "packed causal": Case(places=[16, 8, 40]),
    "packed full": Case(places=[16, 8, 40], causal=False),
    "padded causal": Case(places=[16, 8, 40], lengths=[9, 8, 21], tail=8),
    "padded full": Case(places=[16, 8, 40], lengths=[3, 1, 38], causal=False),
    "dense window": Case(places=[48], packed=False, window=(3, 0)),
    "packed window both ways": Case(places=[16, 40], window=(9, 4), causal=False),
    "dense spans": Case(places=[48], packed=False, batch=2, span=(9, 35)),
    "packed window and spans": Case(places=[16, 40], window=(3, 0), span=(20, 45)),
    "bf16 packed": Case(places=[16, 48], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_attention(ranks: RankPool, size: int) -> None:
    by_rank = ranks(size)(attend_on_ranks, list(CASES.values()), size=size)
    for index, (name, case) in enumerate(CASES.items()):
        held = [positions_of(rank, size, case.places, case.tail) for rank in range(size)]
        order = torch.tensor([p for positions in held for p in positions]).argsort()
        merged = [
            torch.cat(parts)[order] for parts in zip(*(r[index] for r in by_rank), strict=True)
        ]
        try:
            assert_equal(merged, case.expected(), 1e-2 if "bf16" in name else 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{name} on {size} ranks: {error}") from error


def slope_with_dropout(size: int) -> tuple[float, float]:
    """The slope of the summed output along a direction, by gradient and by difference."""
    from megatron.mimo.layers.attention.paths import Rule, dense_attention
    from megatron.mimo.layers.attention.visibility import Visibility

    group = model_parallel(cp=size).cp
    rule = Rule(visibility=Visibility.of(causal=True), scale=0.3, dropout=0.4, group=group)
    *leaves, weight = (tensor.double() for tensor in make_inputs(10, 2, (4, 2), D))
    torch.manual_seed(5 + group.rank())
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def value(step: float) -> Tensor:
        torch.manual_seed(7)
        moved = [leaf + step * way for leaf, way in zip(leaves, directions, strict=True)]
        return (dense_attention(*moved, rule).flatten(2) * weight).sum()

    leaves = [leaf.requires_grad_() for leaf in leaves]
    value(0.0).backward()
    slope = sum((leaf.grad * way).sum() for leaf, way in zip(leaves, directions, strict=True))
    with torch.no_grad():
        difference = (value(1e-5) - value(-1e-5)) / 2e-5
    both = torch.stack([slope, difference]).detach()
    dist.all_reduce(both, group=group)
    return both[0].item(), both[1].item()


def test_dropout_under_context_parallelism(ranks: RankPool) -> None:
    for slope, difference in ranks(2)(slope_with_dropout, 2):
        assert slope == pytest.approx(difference, rel=1e-6)


def drop_on_tensor_parallel_rank(sequence_parallel: bool) -> tuple[Tensor, bool]:
    """Which weights a rank drops, and whether the default generator stays where it was."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.mimo.layers import CoreAttention

    groups = model_parallel(tp=2)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4 * D,
        num_attention_heads=4,
        attention_dropout=0.5,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        transformer_impl="local",
    )
    module = CoreAttention(config, 1, AttnMaskType.no_mask, "self", pg_collection=groups)
    q, k, _, _ = make_inputs(D, 1, (2, 2), D)
    show_weights = torch.eye(D)[:, None, None].expand(D, 1, 2, D)
    before = torch.get_rng_state()
    if sequence_parallel:
        with get_cuda_rng_tracker().fork():  # as TransformerBlock does
            dropped = module(q, k, show_weights, None) == 0
    else:
        dropped = module(q, k, show_weights, None) == 0
    module.eval()
    assert (module(q, k, show_weights, None) > 0).all()
    return dropped, torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_drop_differently(ranks: RankPool, sequence_parallel: bool) -> None:
    (one, kept), (other, _) = ranks(2)(drop_on_tensor_parallel_rank, sequence_parallel)
    assert kept
    assert 0.4 < one.float().mean() < 0.6
    assert 0.4 < (one != other).float().mean() < 0.6


def loss_and_gradients(
    size: int, documents: list[int] | None, recompute: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of a tiny GPT, with its sequence over ``size`` ranks, and its gradients."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from tests.distributed.tiny_gpt import VOCABULARY, build_gpt

    group = model_parallel(cp=size).cp
    model = build_gpt(num_query_groups=2, context_parallel_size=size, **recompute).module
    places, batch = documents or [16], 1 if documents else 3
    tokens = sum(places)
    generator = torch.Generator().manual_seed(1)
    ids_BS, labels_BS = torch.randint(VOCABULARY, (2, batch, tokens), generator=generator)
    position_S = torch.cat([torch.arange(place) for place in places])
    held = positions_of(group.rank(), size, places)
    packed = None
    if documents:
        sums = torch.tensor([0, *torch.tensor(places).cumsum(0)], dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=sums,
            cu_seqlens_kv=sums,
            max_seqlen_q=max(places),
            max_seqlen_kv=max(places),
        )
    loss_BS = model(
        ids_BS[:, held],
        position_S[held].expand(batch, -1),
        None,
        labels=labels_BS[:, held],
        packed_seq_params=packed,
    )
    loss = loss_BS.sum() / (batch * tokens)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=group)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient, group=group)
        gradients[name] = gradient
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("documents", "recompute"),
    [
        (None, {}),
        (None, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
        ([8, 24], {}),
        (
            [8, 24],
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ),
    ],
    ids=["dense", "dense recomputed attention", "packed", "packed recomputed"],
)
def test_gpt_under_context_parallelism(
    ranks: RankPool, documents: list[int] | None, recompute: dict[str, Any]
) -> None:
    ((expected_loss, expected),) = ranks(1)(loss_and_gradients, 1, documents, {})
    for loss, gradients in ranks(2)(loss_and_gradients, 2, documents, recompute):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, f"{name}: relative error {error:.1e}"


def refuse_uneven(size: int) -> str:
    from megatron.core.models.mimo.errors import InputError

    groups = model_parallel(cp=size)
    with pytest.raises(InputError) as caught:
        attend_case(Case(places=[8, 10], tail=2), groups, size)
    return str(caught.value)


def test_refuses_a_document_that_cannot_be_dealt_out(ranks: RankPool) -> None:
    messages = ranks(2)(refuse_uneven, 2)
    expected = "document 1 is 10 tokens long with padding, not divisible by 2*cp = 4; pad it to 12"
    assert messages == [expected] * 2


def latent_attention() -> tuple[Tensor, Tensor]:
    """Losses of a GPT with multi-latent attention: two rows, and the same two packed in one."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.mimo.layers import language_layer_spec

    model_parallel()
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=16,  # queries and keys have 24
        rope_type="rope",
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        transformer_impl="local",
    )
    model = GPTModel(config, language_layer_spec(config), 64, 16, position_embedding_type="rope")
    ids_BS = torch.randint(64, (2, 16))
    positions_BS = torch.arange(16).expand(2, -1)
    sums = torch.tensor([0, 16, 32], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=sums, cu_seqlens_kv=sums, max_seqlen_q=16, max_seqlen_kv=16
    )
    rows = model(ids_BS, positions_BS, None, labels=ids_BS)
    one_row = [tensor.reshape(1, -1) for tensor in (ids_BS, positions_BS)]
    together = model(*one_row, None, labels=one_row[0], packed_seq_params=packed)
    return rows.detach().flatten(), together.detach().flatten()


def test_latent_attention_packed_equals_its_rows(ranks: RankPool) -> None:
    ((rows, together),) = ranks(1)(latent_attention)
    torch.testing.assert_close(together, rows, rtol=1e-5, atol=0)
