"""What a run says when it ends."""

from __future__ import annotations

import socket
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from megatron.core.models.mimo.errors import InputError
from megatron.mimo.process.failure import describe, lost_peer, origin, unexpected_exit


class Unreadable(Dataset[None]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise InputError(f"line {index}: ValueError: bad: x")


class Broken(Dataset[None]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        _refuse()


def read(dataset: Dataset[None], workers: int) -> None:
    """A process that reads is ended at once: torch waits five seconds for one that has raised."""
    batches = iter(DataLoader(dataset, num_workers=workers))
    try:
        next(batches)
    finally:
        for process in getattr(batches, "_workers", ()):
            process.terminate()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_data_is_one_line_wherever_it_is_read(workers: int) -> None:
    with pytest.raises(InputError) as caught:
        read(Unreadable(), workers)
    assert describe(caught.value) == "line 0: ValueError: bad: x"


def raised(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("it raised nothing")


def _refuse() -> None:
    raise RuntimeError("Connection refused")


def test_an_error_of_a_recipe_is_no_lost_connection_whatever_it_says() -> None:
    assert not lost_peer(raised(_refuse))
    assert not lost_peer(ConnectionRefusedError("Connection refused"))


def test_a_connection_that_torch_lost_is_one() -> None:
    def ask() -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        dist.TCPStore("localhost", port, 2, is_master=False, timeout=timedelta(seconds=1))

    lost = raised(ask)
    assert lost_peer(lost)

    def save() -> None:
        raise InputError("a checkpoint could not be written") from lost

    assert lost_peer(raised(save))


def test_an_error_is_placed_where_it_began() -> None:
    def fail() -> None:
        try:
            _refuse()
        except RuntimeError as error:
            raise InputError("sample 3 cannot be read") from error

    assert str(origin(raised(fail))).endswith(" in _refuse")
    assert "test_failure.py:" in str(origin(raised(fail)))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_line_names_what_a_process_that_reads_has_raised(workers: int) -> None:
    error = raised(lambda: read(Broken(), workers))
    assert describe(error) == "RuntimeError: Connection refused"
    assert str(origin(error)).endswith(" in _refuse")


def test_leaving_within_a_run_is_no_success() -> None:
    leaving = raised(lambda: sys.exit(0))
    assert isinstance(leaving, SystemExit)
    assert unexpected_exit(leaving)
    assert describe(leaving) == "sys.exit(0) was called within the run, which is not complete"
    asked = raised(lambda: ArgumentParser(prog="x").parse_args(["--help"]))
    assert isinstance(asked, SystemExit)
    assert not unexpected_exit(asked)
