"""The device on which ranks meet, and the end of process groups, with NCCL's part acted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.mimo.arguments.standalone import process_groups
from megatron.mimo.backend import job, select_backend


@pytest.fixture(autouse=True)
def no_job() -> Iterator[None]:
    select_backend("cpu")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> dist.ProcessGroup:
    """A job of one that says it is NCCL's, on the third GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    return dist.group.WORLD


def recording_barrier() -> tuple[Any, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    def barrier(
        group: Any = None, async_op: bool = False, device_ids: Any = None, timeout: Any = None
    ) -> None:
        calls.append((group, async_op, device_ids, timeout))

    return job.naming_the_device(barrier), calls


def test_barriers_meet_on_the_chosen_gpu(nccl: dist.ProcessGroup) -> None:
    barrier, calls = recording_barrier()
    barrier()
    barrier(nccl, True, timeout=5)
    barrier(device_ids=[0])
    barrier(dist.GroupMember.NON_GROUP_MEMBER)
    assert calls == [
        (None, False, [2], None),
        (nccl, True, [2], 5),
        (None, False, [0], None),
        (dist.GroupMember.NON_GROUP_MEMBER, False, None, None),
    ]


def test_barriers_of_gloo_and_without_a_job_are_left_alone() -> None:
    barrier, calls = recording_barrier()
    barrier()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    barrier(group=dist.group.WORLD)
    dist.barrier()  # the patched one, in earnest
    assert calls == [(None, False, None, None), (dist.group.WORLD, False, None, None)]


def test_a_rank_that_fails_aborts_nccl_and_waits_for_nobody(
    nccl: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("waits for peers"))
    job.leave_job()
    assert not dist.is_initialized()
    job.leave_job()
    job.end_job()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_without_a_run_ends_its_job_as_it_went(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.mimo.arguments import standalone

    ends: list[str] = []
    for name in ("leave_job", "end_job"):
        monkeypatch.setattr(standalone, name, lambda name=name: ends.append(name))
    try:
        with process_groups():
            assert dist.is_initialized()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert ends[0] == ("leave_job" if fails else "end_job")
