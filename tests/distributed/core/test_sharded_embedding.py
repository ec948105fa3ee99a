"""Embedding and merge under context and sequence parallelism: equal to one process, and no rank
ever holds more than its part of the sequence."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rank_pool import model_parallel
from tests.unit.core.mimo.interpreted import interpreted_kernels

SEQUENCE, BATCH, HIDDEN, VOCABULARY = 32, 3, 8, 64
IMAGE, SOUND = 60, -7


class LargestTensor(TorchDispatchMode):
    """Remembers the largest floating-point tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


def batch(text_only: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ids [B, S] and the rows of two modalities, uneven over samples and positions."""
    generator = torch.Generator().manual_seed(3)
    ids_BS = torch.randint(0, IMAGE, (BATCH, SEQUENCE), generator=generator)
    if not text_only:
        ids_BS[0, 1:6] = IMAGE
        ids_BS[0, 30:32] = SOUND
        ids_BS[2, 14:19] = IMAGE
        ids_BS[2, 19] = SOUND
    rows = {
        name: torch.randn(int((ids_BS == token).sum()), HIDDEN, generator=generator)
        for name, token in (("images", IMAGE), ("sound", SOUND))
    }
    return ids_BS, {name: part.requires_grad_() for name, part in rows.items() if part.numel()}


def reference(
    table_VH: torch.Tensor, text_only: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Merged embeddings, the gradients of a random projection of them, and that projection."""
    ids_BS, rows = batch(text_only)
    table_VH = table_VH.clone().requires_grad_()
    taken = dict.fromkeys(rows, 0)
    merged = []
    for sample in ids_BS.tolist():
        for token in sample:
            name = {IMAGE: "images", SOUND: "sound"}.get(token)
            if name is None:
                merged.append(F.embedding(torch.tensor(token), table_VH))
            else:
                merged.append(rows[name][taken[name]])
                taken[name] += 1
    merged_SBH = torch.stack(merged).view(BATCH, SEQUENCE, HIDDEN).transpose(0, 1)
    weight_SBH = torch.randn(merged_SBH.shape, generator=torch.Generator().manual_seed(4))
    (merged_SBH * weight_SBH).sum().backward()
    grads = {name: part.grad for name, part in rows.items()}
    return merged_SBH.detach(), table_VH.grad, grads, weight_SBH


def sharded(
    tp: int, cp: int, text_only: bool, *, sequence_parallel: bool = True, by_kernels: bool = False
) -> dict[str, Any]:
    """One rank's part: errors against the reference, and the largest tensor it held."""
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.mimo.alignment import build_alignment_plan, with_row_index
    from megatron.core.models.mimo.model.merging.merge import embed_streams
    from megatron.core.models.mimo.partition.utils import (
        PartitionAdapter,
        PartitionConfig,
        sequence_cut,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = model_parallel(tp=tp, cp=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=sequence_parallel and tp > 1,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
    )
    embedding = LanguageModelEmbedding(
        config, VOCABULARY, SEQUENCE, "none", scatter_to_sequence_parallel=False, tp_group=groups.tp
    )
    weight = embedding.word_embeddings.weight
    table_VH = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))
    first = groups.tp.rank() * weight.size(0)
    part = slice(first, first + weight.size(0))
    weight.data.copy_(table_VH[part])
    merged_SBH, grad_VH, grads, weight_SBH = reference(table_VH, text_only)

    ids_BS, rows = batch(text_only)
    adapter = PartitionAdapter(PartitionConfig.from_mp_config(config, max_seq_len=SEQUENCE))
    special = {"images": IMAGE, "sound": SOUND}
    plan = sequence_cut(adapter, None).share_of_plan(build_alignment_plan(ids_BS, special))
    if by_kernels:
        plan = with_row_index(plan)
    positions_S = torch.arange(SEQUENCE) if plan.positions_S is None else plan.positions_S
    with LargestTensor() as largest, interpreted_kernels() if by_kernels else nullcontext():
        held_SBH = embed_streams(embedding, plan, rows, None)
        held_SBH.backward(weight_SBH[positions_S])
    # the shares of context-parallel ranks are summed by the data-parallel reduction
    for tensor in (weight.grad, *(part.grad for part in rows.values())):
        torch.distributed.all_reduce(tensor, group=groups.cp)
    worst = max(
        (part.grad - grads[name]).abs().max().item() for name, part in rows.items()
    ) if rows else 0.0  # fmt: skip
    return {
        "positions": positions_S.tolist(),
        "merged": (held_SBH.detach() - merged_SBH[positions_S]).abs().max().item(),
        "rows": worst,
        "table": (weight.grad - grad_VH[part]).abs().max().item(),
        "largest": largest.numel,
    }


@pytest.mark.parametrize("text_only", [False, True], ids=["images", "text"])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_sharded_embedding_equals_a_loop_over_tokens(
    ranks: Any, tp: int, cp: int, text_only: bool
) -> None:
    results = ranks(tp * cp)(sharded, tp, cp, text_only)
    held = [position for result in results for position in result["positions"]]
    assert sorted(held) == list(range(SEQUENCE))
    whole = SEQUENCE * BATCH * HIDDEN
    table = VOCABULARY // tp * HIDDEN
    for result in results:
        assert result["merged"] == 0
        assert result["rows"] < 1e-6
        assert result["table"] < 1e-5
        assert result["largest"] <= max(whole // (tp * cp), table)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("tp", "cp", "sequence_parallel"), [(2, 2, True), (2, 1, False)])
def test_the_kernels_place_shares_and_parts_of_a_vocabulary(
    ranks: Any, tp: int, cp: int, sequence_parallel: bool
) -> None:
    results = ranks(tp * cp)(
        sharded, tp, cp, False, sequence_parallel=sequence_parallel, by_kernels=True
    )
    for result in results:
        assert result["merged"] == 0
        assert result["rows"] < 1e-6
        assert result["table"] < 1e-5


def gradient_of_frequent_tokens(tp: int, *, sequence_parallel: bool) -> float:
    """Relative error of a bf16 table's gradient [V, H] of this rank; ids 31 and 32 are two ranks'.

    Compared with a sum in fp64. One rounding to bf16 is 2e-3 in this norm.
    """
    from megatron.core.models.mimo.alignment import build_alignment_plan
    from megatron.core.models.mimo.model.merging.lookup import look_up_text
    from megatron.core.models.mimo.partition.utils import (
        PartitionAdapter,
        PartitionConfig,
        sequence_cut,
    )
    from megatron.core.tensor_parallel import VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = model_parallel(tp=tp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
    )
    module = VocabParallelEmbedding(
        VOCABULARY,
        HIDDEN,
        init_method=torch.nn.init.normal_,
        config=config,
        tp_group=groups.tp,
    )
    generator = torch.Generator().manual_seed(5)
    ids_BS = torch.randint(31, 33, (2, 1024), generator=generator)
    plan = build_alignment_plan(ids_BS, {})
    if sequence_parallel:
        adapter = PartitionAdapter(PartitionConfig.from_mp_config(config, max_seq_len=1024))
        plan = sequence_cut(adapter, None).share_of_plan(plan)
    gradient_SBH = torch.rand(1024, 2, HIDDEN, generator=generator).add(0.5).bfloat16()
    positions_S = slice(None) if plan.positions_S is None else plan.positions_S
    mine_NH = gradient_SBH[positions_S].transpose(0, 1).flatten(0, 1)
    look_up_text(module, plan).backward(mine_NH)
    sums_VH = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float64)
    sums_VH.index_add_(0, ids_BS.t().flatten(), gradient_SBH.flatten(0, 1).double())
    first = module.vocab_start_index
    expected_VH = sums_VH[first : first + module.weight.size(0)]
    return ((module.weight.grad.double() - expected_VH).norm() / expected_VH.norm()).item()


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_gradients_of_frequent_tokens_are_summed_in_fp32(
    ranks: Any, tp: int, sequence_parallel: bool
) -> None:
    errors = ranks(tp)(gradient_of_frequent_tokens, tp, sequence_parallel=sequence_parallel)
    assert max(errors) < 5e-3
