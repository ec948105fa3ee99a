"""Which job this process belongs to, from what its launcher has set; and its threads.

torchrun says it in ``RANK`` and ``WORLD_SIZE``, which PyTorch and Megatron read. Slurm, Open MPI
and other MPIs have words of their own, which are translated here. Nothing of PyTorch is imported,
for what it reads at its import is set here too.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass

from megatron.mimo.process.ports import held_port

__all__ = ["LaunchError", "first_host", "join_job", "set_threads"]

_PORTS = range(20000, 32000)  # below those that systems give away
_START = "start with torchrun --nproc-per-node N ..., which sets both"
_JOB_NAMES = (  # what tells jobs apart, and is the same for all processes of one
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    *("OMPI_MCA_orte_ess_jobid", "PMI_JOBID", "PBS_JOBID", "LSB_JOBID"),
)
_held = ExitStack()  # the port of a job of one process, as long as this one lives

Environment = MutableMapping[str, str]


class LaunchError(ValueError):
    """What a launcher has set does not make a job."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One process of a job, as its launcher numbers it.

    Attributes:
        launcher: its name, for messages.
        rank, size: this process, and all of them.
        local_rank, local_size: the same on this host; None where the launcher does not say.
        host: the first process's; None where the launcher does not say.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    host: str | None


def join_job(environment: Environment | None = None) -> None:
    """Set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    What is set already stays: torchrun inside of ``srun`` wins. A process without a launcher, or
    alone in a step of one, is a job of its own.

    Args:
        environment: to read and to change; None for this process's.

    Raises:
        LaunchError: variables that do not belong together, or a job on several hosts whose first
            one is not known.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment or "WORLD_SIZE" in environment:
        _check(environment)
        return
    task = _task(environment)
    if task is None or task.size == 1:
        _set_single(environment)
        return
    if not 0 <= task.rank < task.size:
        raise LaunchError(f"{task.launcher} says process {task.rank} of {task.size}; {_START}")
    several_hosts = task.local_size is None or task.local_size < task.size
    if "MASTER_ADDR" not in environment:
        if task.host is None and several_hosts:
            raise LaunchError(
                f"{task.launcher} starts {task.size} processes, and does not say where the first "
                "one is: give its host, mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..., or "
                "start with torchrun --nnodes ... --rdzv-endpoint HOST:29500"
            )
        environment["MASTER_ADDR"] = (task.host or "localhost") if several_hosts else "localhost"
    local_rank = task.rank if task.local_rank is None else task.local_rank
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible:  # Slurm may show each task its own device only
        local_rank %= len(visible.split(","))
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_port(environment))
        if task.rank == 0 and _is_taken(int(environment["MASTER_PORT"])):
            raise LaunchError(
                f"port {environment['MASTER_PORT']}, which follows from the job's id, is taken; "
                "set MASTER_PORT to a free one, the same for all processes"
            )
    environment["RANK"], environment["WORLD_SIZE"] = str(task.rank), str(task.size)
    environment["LOCAL_RANK"] = str(local_rank)
    if task.local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = str(task.local_size)


def set_threads(environment: Environment | None = None) -> None:
    """Set ``OMP_NUM_THREADS``, unless it is: the cores of this process, shared with its job.

    Before PyTorch is imported; after ``join_job``. Threads that wait for one another give their
    core away: the default, to wait in a loop, makes a small model many times slower as soon as
    another process wants a core.
    """
    environment = os.environ if environment is None else environment
    if environment.get("OMP_NUM_THREADS"):
        return
    own = environment.get("SLURM_CPUS_PER_TASK", "")
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or "1"
    cores = int(own) if own.isdigit() and own != "0" else _cores() // int(local)
    environment["OMP_NUM_THREADS"] = str(max(1, cores))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules:  # it has read the variable
        sys.modules["torch"].set_num_threads(max(1, cores))


def first_host(hosts: str) -> str:
    """The first of a list in Slurm's notation: ``gpu[003-010,12],login`` is ``gpu003``."""
    depth, end = 0, len(hosts)
    for place, letter in enumerate(hosts):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = place
            break
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", hosts[:end])


def _check(environment: Environment) -> None:
    """What torchrun sets, or a person: whole and plausible."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environment:
            raise LaunchError(
                f"{other}={environment[other]} is set without {name}; {_START}, or unset {other}"
            )
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise LaunchError(
            f"RANK={rank} with WORLD_SIZE={size}: expected 0 to {max(size - 1, 0)}; {_START}"
        )
    if size == 1:
        _set_single(environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise LaunchError(f"RANK and WORLD_SIZE are set without {name}; set it, or {_START}")
    environment.setdefault("LOCAL_RANK", str(rank))


def _set_single(environment: Environment) -> None:
    if "MASTER_PORT" not in environment or "RANK" not in environment:
        environment["MASTER_PORT"] = str(_held.enter_context(held_port()))
        environment["MASTER_ADDR"] = "localhost"
    environment.setdefault("MASTER_ADDR", "localhost")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        environment.setdefault(name, value)


def _task(environment: Environment) -> _Task | None:
    """This process by its nearest launcher; another's words where both mean the same job."""
    tasks = (_open_mpi(environment), _slurm(environment), _pmi(environment))
    told = [task for task in tasks if task is not None]
    same = [task for task in told if (task.rank, task.size) == (told[0].rank, told[0].size)]
    knows = [task for task in same if task.host is not None or task.local_size is not None]
    return next(iter(knows or told), None)


def _open_mpi(environment: Environment) -> _Task | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    return _Task(
        launcher="mpirun",
        rank=_number(environment, "OMPI_COMM_WORLD_RANK"),
        size=_number(environment, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_optional(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=_optional(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        host=None,
    )


def _slurm(environment: Environment) -> _Task | None:
    """A task of ``srun``; a batch script and a shell of ``salloc`` are none, whatever they ask."""
    if "SLURM_PROCID" not in environment:
        return None
    size = _optional(environment, "SLURM_STEP_NUM_TASKS")
    if size is None:
        if environment.get("ENVIRONMENT") == "BATCH":  # set in the script, where no step is
            return None
        size = _optional(environment, "SLURM_NTASKS")
    if size is None:
        size = _optional(environment, "SLURM_NPROCS")
    if size is None or size == 1:
        return None
    hosts = (
        environment.get("SLURM_STEP_NODELIST")
        or environment.get("SLURM_JOB_NODELIST")
        or environment.get("SLURM_NODELIST")
    )
    nodes = _optional(environment, "SLURM_STEP_NUM_NODES") or _optional(environment, "SLURM_NNODES")
    one = nodes == 1 or (nodes is None and (not hosts or not re.search(r"[\[,]", hosts)))
    return _Task(
        launcher="srun",
        rank=_number(environment, "SLURM_PROCID"),
        size=size,
        local_rank=_optional(environment, "SLURM_LOCALID"),
        local_size=size if one else _tasks_here(environment),
        host=first_host(hosts) if hosts else None,
    )


def _tasks_here(environment: Environment) -> int | None:
    """Tasks on this node, from a list such as ``4(x2),3``: four on two nodes, three on another."""
    counts: list[int] = []
    told = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told or ""):
        counts += [int(tasks)] * int(times or 1)
    node = _optional(environment, "SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None


def _pmi(environment: Environment) -> _Task | None:
    if "PMI_SIZE" not in environment:
        return None
    return _Task(
        launcher="mpirun",
        rank=_number(environment, "PMI_RANK"),
        size=_number(environment, "PMI_SIZE"),
        local_rank=_optional(environment, "MPI_LOCALRANKID"),
        local_size=_optional(environment, "MPI_LOCALNRANKS"),
        host=None,
    )


def _port(environment: Environment) -> int:
    """One that all processes of a job find alone: from its id or, without one, its command."""
    names = [environment[name] for name in _JOB_NAMES if name in environment]
    names = names or [os.getcwd(), *sys.argv]
    return _PORTS[zlib.crc32("\0".join([str(os.getuid()), *names]).encode()) % len(_PORTS)]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _cores() -> int:
    """What this process may use: its affinity and, in a container, its quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            return max(1, min(cores or 1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores or 1


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r}: expected a number; {_START}") from None


def _optional(environment: Environment, name: str) -> int | None:
    return _number(environment, name) if environment.get(name) else None
