"""A port that is held is the system's to give to nobody, and one's own to listen on."""

from __future__ import annotations

import errno
import socket
import sys
from struct import pack

import pytest
import torch.distributed as dist

from megatron.mimo.process.launcher import join_job
from megatron.mimo.process.ports import held_port

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="sockets are told their ports on Linux alone"
)
_IP_LOCAL_PORT_RANGE = 51  # of Linux 6.3: from which ports the system chooses for this socket


def given_by_the_system(port: int) -> bool:
    """Whether a program that asks for any port may be given this one."""
    with socket.socket() as other:
        try:
            other.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, pack("I", port << 16 | port))
        except OSError:
            pytest.skip("this system chooses from all its ports: Linux 6.3 can be told which")
        try:
            other.bind(("", 0))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        assert other.getsockname()[1] == port
        return True


@on_linux
def test_nobody_else_is_given_the_port() -> None:
    with held_port() as port:
        assert not given_by_the_system(port)
    assert given_by_the_system(port)


def test_a_store_listens_on_it() -> None:
    with held_port() as port:
        store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        assert store.port == port
        client = dist.TCPStore("localhost", port, is_master=False)
        client.set("held", "yes")
        assert store.get("held") == b"yes"


@on_linux
def test_a_job_of_one_process_keeps_its_port() -> None:
    environment: dict[str, str] = {}
    join_job(environment)
    assert not given_by_the_system(int(environment["MASTER_PORT"]))
