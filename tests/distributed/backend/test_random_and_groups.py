"""Dropout under tensor parallelism, and process groups on gloo."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.rank_pool import RankPool, model_parallel


def _masks() -> list[torch.Tensor]:
    """Dropout of ones: outside, inside a fork, outside, inside after a restored state, inside."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    model_parallel(tp=2)
    tracker, ones = get_cuda_rng_tracker(), torch.ones(256)
    saved = tracker.get_states()
    masks = [torch.nn.functional.dropout(ones)]
    with tracker.fork():
        masks.append(torch.nn.functional.dropout(ones))
    masks.append(torch.nn.functional.dropout(ones))
    tracker.set_states(saved)
    for _ in range(2):
        with tracker.fork():
            masks.append(torch.nn.functional.dropout(ones))
    return masks


def test_dropout_differs_inside_the_fork_and_is_equal_outside(
    ranks: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = ranks(2)(_masks)
    equal = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert equal == [True, False, True, False, False]
    outside, inside, outside_again, restored, inside_again = first
    assert torch.equal(inside, restored)
    assert not torch.equal(inside, inside_again)
    assert not torch.equal(outside, outside_again)


def _new_groups(count: int) -> tuple[str, int, float]:
    threads = len(os.listdir("/proc/self/task"))
    backends = set()
    total = torch.ones(())
    for index in range(count):
        group = dist.new_group([0, 1], backend="nccl" if index % 2 else None)
        backends.add(dist.get_backend(group))
        dist.all_reduce(total, group=group)
    return ",".join(backends), len(os.listdir("/proc/self/task")) - threads, total.item()


def test_groups_share_one_device(ranks: RankPool) -> None:
    """torch's own gloo starts three threads per group."""
    assert ranks(2)(_new_groups, 10) == [("gloo", 10, 2.0**10)] * 2


def _groups_of_one_member() -> int:
    mine = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=mine)
    return int(total.item())


def test_groups_of_others_do_not_block(ranks: RankPool) -> None:
    assert ranks(3)(_groups_of_one_member) == [0, 1, 2]


def _slow_member_of_new_group() -> float:
    """When rank 1, which sleeps inside ``new_group``, is connected; when rank 0 returns from it.

    In seconds of the clock that all processes of a machine share.
    """
    import time

    from torch.distributed import distributed_c10d

    connected: list[float] = []
    if dist.get_rank() == 1:
        stock = distributed_c10d.ProcessGroupGloo

        class Slow(stock):  # type: ignore[misc, valid-type]
            def __init__(self, *args: object, **keywords: object) -> None:
                super().__init__(*args, **keywords)
                time.sleep(0.5)
                connected.append(time.monotonic())

        distributed_c10d.ProcessGroupGloo = Slow
    dist.new_group([0, 1])
    return connected[0] if connected else time.monotonic()


def test_new_group_returns_when_every_member_is_connected(ranks: RankPool) -> None:
    returned, connected = ranks(2)(_slow_member_of_new_group)
    assert returned >= connected
