"""Media that a cache lacks are divided among the ranks that share a batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.rank_pool import RankPool
from tests.unit.mimo.training.test_encoder_cache import Encoder, encoded, submodule_of

SIZES = (3, 1, 2, 2, 4, 3)


def encode_what_is_missing(folder: Path) -> tuple[int, bool, int]:
    """Media that this rank encoded; whether rows are right; media that lie in the cache then."""
    from megatron.core.models.mimo.comm.encoder_split import EncoderSplit, Sharers
    from megatron.mimo.data.cached_items import look_up
    from megatron.mimo.data.row_cache import RowCache
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
