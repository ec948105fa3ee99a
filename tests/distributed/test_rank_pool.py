"""The rank pool itself: results, failures, hangs, deaths, scripts."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.rank_pool import RankPool, RanksFailedError, model_parallel


def describe_self(word: str, *, scale: int) -> tuple[int, int, str, torch.Tensor]:
    rank = dist.get_rank()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return rank, torch.get_num_threads(), word, total * scale


def fail_on_rank(bad: int) -> None:
    if dist.get_rank() == bad:
        raise ValueError(f"rank {bad} is unwell")
    dist.barrier()


def hang_in_all_gather(absent: int) -> None:
    if dist.get_rank() == absent:
        time.sleep(600)
    parts = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.ones(1))


def die(bad: int, number: int) -> None:
    if dist.get_rank() == bad:
        os.kill(os.getpid(), number)
    dist.barrier()


def return_a_lambda() -> Any:
    return lambda: None


def leave_children() -> list[int]:
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    escaped = subprocess.Popen(["sleep", "600"], start_new_session=True)
    return [orphan.pid, escaped.pid]


def use_worker_processes(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(1) as workers:
        return workers.map(abs, [-2, 4])


def draw_and_build() -> tuple[float, float, int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    groups = model_parallel(tp=2)
    outside = torch.rand(()).item()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(()).item()
    assert groups.tp.size() == parallel_state.get_tensor_model_parallel_world_size() == 2
    return outside, inside, parallel_state.get_data_parallel_rank()


def environment_of_rank() -> dict[str, str]:
    return dict(os.environ)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stays_alive(pid: int) -> bool:
    """A process that was killed is gone once the kernel has got round to it."""
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return alive(pid)


@pytest.fixture
def script(tmp_path: Path) -> Any:
    def write(source: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source))
        return path

    return write


def test_results_come_back_by_rank(ranks: RankPool) -> None:
    results = ranks(3)(describe_self, "hello", scale=2)
    assert [result[:3] for result in results] == [(rank, 1, "hello") for rank in range(3)]
    assert [result[3].item() for result in results] == [12.0] * 3


def test_environment_is_torchruns_and_the_tests(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")
    environments = ranks(2)(environment_of_rank)
    assert [e["RANK"] + e["LOCAL_RANK"] + e["WORLD_SIZE"] for e in environments] == ["002", "112"]
    assert {e["SET_BY_THE_TEST"] for e in environments} == {"yes"}
    assert {e["CUDA_VISIBLE_DEVICES"] for e in environments} == {""}


def test_failure_names_the_rank_and_the_pool_survives(ranks: RankPool) -> None:
    with pytest.raises(RanksFailedError) as failure:
        ranks(3)(fail_on_rank, 1)
    message = str(failure.value)
    first, second = message.split("---- rank ")[1:3]
    assert first.startswith("1: ValueError: rank 1 is unwell")
    assert "in fail_on_rank" in first
    assert "rank_pool/rank.py" not in first
    assert second[0] in "02"
    assert "barrier" in second
    assert ranks(1)(describe_self, "again", scale=1)[0][3].item() == 1.0


def test_time_out_names_the_collective(ranks: RankPool) -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailedError) as failure:
        ranks(2, timeout=1)(hang_in_all_gather, absent=1)
    assert time.monotonic() - started < 10
    message = str(failure.value)
    assert "rank 0: still running after 1 s, in the collective all_gather" in message
    assert "rank 1: still running after 1 s, in hang_in_all_gather" in message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_dying_rank_is_reported_first(ranks: RankPool, number: signal.Signals) -> None:
    with pytest.raises(RanksFailedError) as failure:
        ranks(2)(die, 1, number)
    first = str(failure.value).split("---- rank ")[1]
    assert first.startswith(f"1: killed by {number.name}")
    assert (number != signal.SIGSEGV) or "in die" in first  # faulthandler's dump


def test_what_cannot_be_sent_is_refused(ranks: RankPool) -> None:
    with pytest.raises(TypeError, match="top level of a module"):
        ranks(1)(lambda: None)
    with pytest.raises(RanksFailedError, match="pickle"):
        ranks(1)(return_a_lambda)
    with pytest.raises(ValueError, match="world size 0"):
        ranks(0)


def test_children_of_ranks_do_not_outlive_the_run(ranks: RankPool) -> None:
    (pids,) = ranks(1)(leave_children)
    assert not any(stays_alive(pid) for pid in pids)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_can_use_processes(ranks: RankPool, method: str) -> None:
    assert ranks(1)(use_worker_processes, method) == [[2, 4]]


def test_model_parallel_seeds_peers_apart_inside_the_fork(ranks: RankPool) -> None:
    results = ranks(4)(draw_and_build)
    outside, inside, data_rank = zip(*results, strict=True)
    assert data_rank == (0, 0, 1, 1)
    assert len(set(outside)) == 1
    assert inside[0] == inside[2] != inside[1] == inside[3]


def test_script_runs_as_main_under_torchruns_environment(ranks: RankPool, script: Any) -> None:
    path = script(
        """
        import multiprocessing, sys

        def square(x):
            return x * x

        if __name__ == "__main__":
            import torch, torch.distributed as dist
            dist.init_process_group("gloo")
            total = torch.tensor(dist.get_rank() + 1)
            dist.all_reduce(total)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                squares = pool.map(square, [3])
            print(sys.argv[1:], total.item(), squares)
            print("to stderr", file=sys.stderr)
            dist.destroy_process_group()
            sys.exit(3 if dist.is_initialized() else None)
        """
    )
    for end in ranks.script(2, [path, "--flag", "x"]):
        assert (end.exit_code, end.stopped) == (0, None), end.stderr
        assert end.stdout == "['--flag', 'x'] 3 [9]\n"
        assert "to stderr" in end.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_ranks_ask_no_name_server(ranks: RankPool, script: Any) -> None:
    path = script(
        """
        import socket
        print(socket.getnameinfo(("::ffff:127.0.0.1", 1234, 0, 0), socket.NI_NUMERICSERV))
        """
    )
    # with no attempt at asking, whoever would ask is told to try again
    (end,) = ranks.script(1, [path], env={"RES_OPTIONS": "attempts:0"})
    assert end.exit_code == 0, end.stderr


def test_failing_script_terminates_its_peers(ranks: RankPool, script: Any) -> None:
    path = script(
        """
        import os, signal, sys, time
        from pathlib import Path

        rank = int(os.environ["RANK"])

        def ready(rank):
            return Path(__file__).with_name(f"ready-{rank}")

        def stop(*_):
            print("saving")
            sys.exit(5)

        signal.signal(signal.SIGTERM, stop)
        if rank == 2:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("up")
        ready(rank).touch()
        if rank == 1:
            while not (ready(0).exists() and ready(2).exists()):
                time.sleep(0.01)
            raise RuntimeError("no disk")
        time.sleep(600)
        """
    )
    zero, one, two = ranks.script(3, [path], grace=1)
    assert (one.exit_code, one.stopped) == (1, None)
    assert "RuntimeError: no disk" in one.stderr
    assert (zero.exit_code, zero.stopped) == (5, "peer")
    assert zero.stdout == "up\nsaving\n"
    assert (two.exit_code, two.stopped) == (-signal.SIGKILL, "peer")


def test_script_can_be_killed_at_any_moment(ranks: RankPool, script: Any) -> None:
    path = script(
        """
        import subprocess, time
        print("child", subprocess.Popen(["sleep", "600"]).pid)
        for step in range(10**6):
            print("step", step)
            time.sleep(0.01)
        """
    )
    with ranks.start_script(2, [path], grace=5) as run:
        for rank in range(2):
            run.wait_for("step 5", rank=rank)
        assert run.running()
        child = int(run.stdout().split()[1])
        run.signal(signal.SIGKILL, rank=0)
        zero, one = run.wait()
    assert (zero.exit_code, zero.stopped) == (-signal.SIGKILL, None)
    assert (one.exit_code, one.stopped) == (-signal.SIGTERM, "peer")
    assert not stays_alive(child)


def test_leaving_a_script_ends_it(ranks: RankPool, script: Any) -> None:
    path = script("import os, time; print(os.getpid()); time.sleep(600)")
    with ranks.start_script(1, [path]) as run:
        run.wait_for("\n")
        pid = int(run.stdout())
    assert not stays_alive(pid)


def test_script_that_hangs_is_located(ranks: RankPool, script: Any) -> None:
    path = script(
        """
        import torch.distributed as dist
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            dist.barrier()
        else:
            import time; time.sleep(600)
        """
    )
    with pytest.raises(RanksFailedError, match=r"rank 0: .* in the collective barrier"):
        ranks.script(2, [path], timeout=2)
