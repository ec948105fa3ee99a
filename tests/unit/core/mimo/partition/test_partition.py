"""Which positions a rank holds, against brute force, and the adapter's public contract.

Legend: S sequence, B micro-batch, H hidden, T packed tokens.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.alignment.cut import (
    context_parallel_positions,
    packed_context_parallel_positions,
    sequence_parallel_positions,
)
from megatron.core.models.mimo.errors import InputError
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from tests.rank_pool import RankPool, model_parallel


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_chunks_are_dealt_from_both_ends(cp_size: int) -> None:
    length = 2 * cp_size * 3
    chunks = torch.arange(length).split(3)
    for cp_rank in range(cp_size):
        got_S = context_parallel_positions(length, cp_rank=cp_rank, cp_size=cp_size)
        assert got_S.tolist() == [*chunks[cp_rank].tolist(), *chunks[-1 - cp_rank].tolist()]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("units", [[1], [2, 1, 3], [1, 0, 2], [1, 1, 1, 1]])
def test_packed_documents_are_dealt_one_by_one(cp_size: int, units: list[int]) -> None:
    ends = [0, *accumulate(2 * cp_size * unit for unit in units)]
    for cp_rank in range(cp_size):
        held = []
        for start, end in pairwise(ends):
            chunk = (end - start) // (2 * cp_size)
            held += range(start + cp_rank * chunk, start + (cp_rank + 1) * chunk)
            held += range(end - (cp_rank + 1) * chunk, end - cp_rank * chunk)
        got_T = packed_context_parallel_positions(
            torch.tensor(ends, dtype=torch.int32),
            total_tokens=ends[-1],
            cp_rank=cp_rank,
            cp_size=cp_size,
        )
        assert got_T.tolist() == held


def test_sequence_parallel_pieces_are_contiguous() -> None:
    pieces = [sequence_parallel_positions(12, tp_rank=rank, tp_size=3) for rank in range(3)]
    assert torch.cat(pieces).tolist() == list(range(12))
    assert pieces[1].tolist() == [4, 5, 6, 7]


def test_uneven_lengths_name_the_padding() -> None:
    with pytest.raises(InputError, match=r"length 30 is not divisible by 2\*cp = 8; pad it to 32"):
        context_parallel_positions(30, cp_rank=0, cp_size=4)
    with pytest.raises(InputError, match="length 7 is not divisible by tp = 2; pad it to 8"):
        sequence_parallel_positions(7, tp_rank=0, tp_size=2)


def test_config_has_to_be_megatrons() -> None:
    with pytest.raises(TypeError, match="mp must be a ModelParallelConfig instance"):
        PartitionConfig.from_mp_config({"context_parallel_size": 2}, max_seq_len=8)  # type: ignore[arg-type]


def test_inactive_adapter_hands_back_the_very_objects() -> None:
    config = PartitionConfig.from_mp_config(ModelParallelConfig(), max_seq_len=8)
    assert not config.use_cp
    assert not config.seq_parallel
    tensors = torch.zeros(7, 2, 3), torch.zeros(2, 7), torch.ones(2, 7)
    packed: Any = object.__new__(_Packed)
    got = PartitionAdapter(config).shard(*tensors, packed)
    assert all(mine is given for mine, given in zip(got, (*tensors, packed), strict=True))


class _Packed:
    qkv_format = "sbhd"


def shard_on_rank(cp: int, tp: int, length: int, packed_ends: list[int] | None) -> Any:
    """What rank (cp, tp) gets of embeddings that hold their position, and of labels."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model_parallel(tp=tp, cp=cp)
    config = PartitionConfig.from_mp_config(
        ModelParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=tp > 1
        ),
        max_seq_len=length,
    )
    embeddings_SBH = torch.arange(length * 2.0).view(length, 2, 1).expand(-1, -1, 3)
    labels_BS = torch.arange(length).repeat(2, 1)
    packed = None
    if packed_ends is not None:
        cu_seqlens = torch.tensor(packed_ends, dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_q_padded=cu_seqlens
        )
    got = PartitionAdapter(config).shard(
        embeddings=embeddings_SBH.contiguous(),
        labels=labels_BS,
        loss_mask=labels_BS.float(),
        packed_seq_params=packed,
    )
    assert got[3] is packed
    off_first = PartitionAdapter(config).shard(None, labels_BS, None, packed)
    assert off_first[0] is None
    assert off_first[2] is None
    assert off_first[1].equal(got[1])
    return got[0], got[1], got[2], config.shard_factor()


def test_adapter_deals_as_megatron_deals_its_batches(ranks: RankPool) -> None:
    for mine, megatron in zip(
        ranks(2)(shard_on_rank, 2, 1, 8, None), ranks(2)(deal_by_megatron, 8), strict=True
    ):
        embeddings_SBH, labels_BS, mask_BS, factor = mine
        assert factor == 4
        assert labels_BS.equal(megatron)
        assert mask_BS.equal(megatron.float())
        assert embeddings_SBH[:, 0, 0].equal(2.0 * megatron[0])


def deal_by_megatron(length: int) -> torch.Tensor:
    from megatron.core.utils import get_batch_on_this_cp_rank

    groups = model_parallel(cp=2)
    batch = {"labels": torch.arange(length).repeat(2, 1), "cu_seqlens": None}
    dealt: torch.Tensor = get_batch_on_this_cp_rank(batch, False, groups.cp)["labels"]
    return dealt


def test_adapter_cuts_for_context_then_for_sequence(ranks: RankPool) -> None:
    length = 16
    for rank, (embeddings_SBH, labels_BS, _, factor) in enumerate(
        ranks(4)(shard_on_rank, 2, 2, length, None)
    ):
        tp_rank, cp_rank = rank % 2, rank // 2
        held = context_parallel_positions(length, cp_rank=cp_rank, cp_size=2)
        assert factor == 8
        assert labels_BS[1].equal(held)
        assert embeddings_SBH[:, 0, 0].equal(2.0 * held.chunk(2)[tp_rank])


def test_adapter_deals_packed_documents_one_by_one(ranks: RankPool) -> None:
    for rank, (embeddings_SBH, labels_BS, _, _) in enumerate(
        ranks(2)(shard_on_rank, 2, 1, 12, [0, 4, 12])
    ):
        held = [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]][rank]
        assert labels_BS[0].tolist() == held
        assert embeddings_SBH[:, 0, 0].tolist() == [2.0 * position for position in held]


def refuse_lengths() -> None:
    groups = model_parallel(tp=2)
    config = PartitionConfig(
        seq_parallel=True, use_cp=False, tp_comm_overlap=True, max_seq_len=8, tp_group=groups.tp
    )
    adapter = PartitionAdapter(config)
    with pytest.raises(AssertionError, match=r"length 7 should be divisible by 2 .* pad it to 8"):
        adapter.shard(torch.zeros(7, 1, 1), None, None)
    with pytest.raises(AssertionError, match=r"TP Comm overlap .* exactly max_seq_len = 8, got 6"):
        adapter.shard(torch.zeros(6, 1, 1), None, None)
    embeddings_SBH, *_ = adapter.shard(torch.arange(8.0).view(8, 1, 1), None, None)
    assert embeddings_SBH is not None
    assert embeddings_SBH.view(-1).tolist() == [4.0 * dist.get_rank() + i for i in range(4)]


def test_lengths_that_do_not_fit_are_refused(ranks: RankPool) -> None:
    ranks(2)(refuse_lengths)
