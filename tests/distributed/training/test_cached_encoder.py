"""Media that a cache lacks are divided among the ranks that share a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.rank_pool import RankPool
from tests.unit.mimo.training.test_encoder_cache import Encoder, encoded, submodule_of

SIZES = (3, 1, 2, 2, 4, 3)


def encode_what_is_missing(folder: Path) -> tuple[int, bool, int]:
    """Media that this rank encoded; whether rows are right; media that lie in the cache then."""
    from megatron.core.models.mimo.comm.encoder_split import EncoderSplit, Sharers
    from megatron.mimo.data.row_cache.cache import RowCache
    from megatron.mimo.data.row_cache.lookup import look_up
    from megatron.mimo.training.encoder_cache import CachedEncoder

    torch.manual_seed(1)
    encoder, cache = Encoder().eval(), RowCache(folder)
    submodule = submodule_of(encoder)
    items = [torch.randn(size, 4) for size in SIZES]
    wanted = encoded(submodule, None, *items)
    rank = dist.get_rank()
    split = EncoderSplit(sharers=(Sharers(group=dist.group.WORLD, gradients="copies"),))
    call = CachedEncoder(cache, writes=rank == 0, divided=split)
    submodule.encoder_calls["tiny"] = call
    batch = {"modality_inputs": {"images": {"tiny": {"pixels": items}}}}
    looked = [look_up(batch, {("images", "tiny"): cache})]
    dist.broadcast_object_list(looked)  # as a batch is read by one of these ranks
    encoder.items = 0
    (found,) = submodule.encode(looked[0]["modality_inputs"]["images"])
    call.finish()
    dist.barrier()
    cache.refresh()
    right = torch.equal(found.rows_NH, wanted.rows_NH.bfloat16().float())
    return encoder.items, right, len(cache)


def test_ranks_divide_what_is_missing(ranks: RankPool, tmp_path: Path) -> None:
    seen = ranks(2)(encode_what_is_missing, tmp_path)
    assert [items for items, *_ in seen] == [4, 2]  # 8 and 7 rows
    assert all(right for _, right, _ in seen)
    assert [there for *_, there in seen] == [6, 6]


def encode_what_all_miss(folder: Path) -> tuple[int, bool]:
    """As above, of context-parallel ranks that each look in a cache, one of them of more media."""
    from megatron.core.models.mimo.comm.encoder_split import EncoderSplit, Sharers
    from megatron.mimo.data.row_cache.agreement import agreed
    from megatron.mimo.data.row_cache.cache import RowCache
    from megatron.mimo.data.row_cache.lookup import look_up
    from megatron.mimo.training.encoder_cache import CachedEncoder

    torch.manual_seed(1)
    rank = dist.get_rank()
    encoder, cache = Encoder().eval(), RowCache(folder / str(rank))
    submodule = submodule_of(encoder)
    items = [torch.randn(size, 4) for size in SIZES]
    wanted = encoded(submodule, None, *items)
    split = EncoderSplit(sharers=(Sharers(group=dist.group.WORLD, gradients="shares"),))
    for number in range(rank + 1):  # as if this rank had looked later than the one before
        call = submodule.encoder_calls["tiny"] = CachedEncoder(cache, writes=True)
        encoded(submodule, cache, items[2 * number])
        call.finish()
    cache.refresh()
    submodule.encoder_calls["tiny"] = CachedEncoder(cache, writes=False, divided=split)
    batch: dict[str, Any] = {"modality_inputs": {"images": {"tiny": {"pixels": items}}}}
    looked = look_up(batch, {("images", "tiny"): cache})
    (agreement,) = agreed(lambda: iter([looked]), dist.group.WORLD)()
    encoder.items = 0
    (found,) = submodule.encode(agreement["modality_inputs"]["images"])
    return encoder.items, torch.equal(found.rows_NH, wanted.rows_NH.bfloat16().float())


def test_context_parallel_ranks_divide_what_they_all_miss(ranks: RankPool, tmp_path: Path) -> None:
    seen = ranks(2)(encode_what_all_miss, tmp_path)
    assert all(right for _, right in seen)
    # both miss items 1, 3, 4 and 5, of 1, 2, 4 and 3 rows, and divide these; the first item 2, too
    assert [items for items, _ in seen] == [3 + 1, 1]


def read_where_one_fails() -> str:
    from megatron.mimo.data.row_cache.agreement import agreed

    def batches() -> Iterator[dict[str, Any]]:
        yield {}
        if dist.get_rank() == 1:
            raise OSError("no such share")
        yield {}

    read = agreed(batches, dist.group.WORLD)()
    assert next(read) == {}
    with pytest.raises(Exception, match="no such share") as told:
        next(read)
    return type(told.value).__name__


def test_an_error_of_one_rank_is_raised_on_all(ranks: RankPool) -> None:
    assert ranks(2)(read_where_one_fails) == ["EchoedError", "OSError"]
