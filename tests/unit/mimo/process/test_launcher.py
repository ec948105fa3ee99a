"""One job out of what Slurm, Open MPI and other MPIs say; torchrun wins, halves are refused."""

from __future__ import annotations

import socket

import pytest

from megatron.mimo.process.launcher import LaunchError, first_host, join_job, set_threads

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_NODELIST": "gpu[001-008]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "there",
    "MASTER_PORT": "29500",
}


def joined(environment: dict[str, str]) -> tuple[str, ...]:
    """RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR."""
    join_job(environment)
    assert 1024 < int(environment["MASTER_PORT"]) < 65536
    return tuple(environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("0", "1", "0", "localhost")),
        (TORCHRUN, ("3", "4", "3", "there")),
        (TORCHRUN | SLURM | OPEN_MPI, ("3", "4", "3", "there")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("0", "1", "0", "localhost")),
        (SLURM, ("5", "8", "1", "gpu007")),
        (SLURM | {"MASTER_ADDR": "10.0.0.7"}, ("5", "8", "1", "10.0.0.7")),
        # each task sees a device of its own
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, ("5", "8", "0", "gpu007")),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
            ("1", "2", "1", "localhost"),
        ),
        (OPEN_MPI, ("1", "2", "1", "localhost")),
        (PMI, ("1", "2", "1", "localhost")),
        # mpirun inside of an allocation: its daemons are Slurm's tasks, its processes are the job
        (
            OPEN_MPI | SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            ("1", "2", "1", "localhost"),
        ),
        # Slurm with an MPI plugin says the same twice
        (
            SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"},
            ("5", "8", "1", "gpu007"),
        ),
    ],
)
def test_jobs(environment: dict[str, str], expected: tuple[str, ...]) -> None:
    assert joined(dict(environment)) == expected


@pytest.mark.parametrize(
    "environment",
    [
        # srun --pty bash, and salloc with an interactive step, in an allocation of eight tasks
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # the script of sbatch: not a step, whatever tasks it may start later
        {
            "ENVIRONMENT": "BATCH",
            "SLURM_JOB_ID": "77",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "8",
            "SLURM_NODELIST": "gpu[001-008]",
        },
        # salloc without one
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_NODELIST": "gpu[001-008]"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["pty", "batch", "salloc", "mpirun -n 1"],
)
def test_one_process_stays_one(environment: dict[str, str]) -> None:
    assert joined(dict(environment)) == ("0", "1", "0", "localhost")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK; start with torchrun"),
        ({"RANK": "1"}, "RANK=1 is set without WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: expected 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x': expected a number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set without MASTER_ADDR"),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "mpirun starts 2 processes, and does not say where the first one is",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "start with torchrun --nnodes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK='': expected a number"),
    ],
)
def test_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        join_job(dict(environment))


def test_all_processes_of_a_job_find_one_port_and_those_of_another_one_more() -> None:
    ports = []
    for job, rank in (("77", "0"), ("77", "7"), ("78", "0")):
        environment = SLURM | {"SLURM_JOB_ID": job, "SLURM_PROCID": rank}
        join_job(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_a_port_that_is_taken_is_said_before_others_wait() -> None:
    first = SLURM | {"SLURM_PROCID": "0"}
    join_job(first)
    with socket.socket() as other:
        other.bind(("", int(first["MASTER_PORT"])))
        other.listen()
        with pytest.raises(LaunchError, match="is taken; set MASTER_PORT"):
            join_job(SLURM | {"SLURM_PROCID": "0"})
        join_job(SLURM | {"SLURM_PROCID": "0", "MASTER_PORT": "29512"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[003-010,12],login", "gpu003"),
        ("gpu[3,7-9]", "gpu3"),
        ("r[1-2]n[05-06],x", "r1n05"),
        ("r[1-2]-ib.cluster", "r1-ib.cluster"),
    ],
)
def test_the_first_of_a_list_of_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.mimo.process.launcher._cores", lambda: 16)
    for environment, threads in (
        ({"OMP_NUM_THREADS": "3", "WORLD_SIZE": "4"}, "3"),
        ({"WORLD_SIZE": "1"}, "16"),
        ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "4"}, "4"),
        ({"WORLD_SIZE": "64"}, "1"),
        ({"WORLD_SIZE": "64", "SLURM_CPUS_PER_TASK": "6"}, "6"),
    ):
        set_threads(environment)
        assert environment["OMP_NUM_THREADS"] == threads
