"""An example that runs on both implementations prints the same on both."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
from pathlib import Path

import torch

from megatron.mimo.process.ports import held_port
from tests.rank_pool import RankPool
from tests.unit.core.mimo.test_stock import library

__all__ = ["assert_gives_what_stock_gives"]


def _output(script: Path, stock: bool, port: int) -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()  # the script makes its own
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # with a store of its own
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with library(stock=stock), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def assert_gives_what_stock_gives(ranks: RankPool, script: Path) -> None:
    """Three steps on four ranks."""
    steps = []
    for stock in (False, True):
        with held_port() as port:
            printed = ranks(4)(_output, script, stock, port)[0]
        steps.append(re.findall(r"^step .*$", printed, re.MULTILINE))
    assert len(steps[0]) == 3
    assert steps[0] == steps[1]
