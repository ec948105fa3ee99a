"""The README's script, examples/mimo/by_hand.py: written for stock MIMO, it runs with either."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import sys
from pathlib import Path

import torch

from tests.rank_pool import RankPool
from tests.unit.core.mimo.test_stock import library

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "examples" / "mimo" / "by_hand.py"


def output_of_script(stock: bool) -> str:
    torch.distributed.destroy_process_group()  # the script makes its own
    torch.manual_seed(0)
    with library(stock=stock), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue()


def test_script_runs_alone(ranks: RankPool) -> None:
    (end,) = ranks.script(1, [SCRIPT])
    assert end.exit_code == 0, end.stderr
    assert re.search(r"^loss \d\.\d\d over 32 tokens on cpu$", end.stdout, re.MULTILINE)


def test_script_gives_what_stock_gives(ranks: RankPool) -> None:
    (ours,) = ranks(1)(output_of_script, False)
    (theirs,) = ranks(1)(output_of_script, True)
    assert ours == theirs
    assert ours.startswith("loss ")


def stand_ins() -> bool:
    """What a script finds that imports the CPU backend where the overlay is switched off."""
    name = "megatron.mimo.backend.own_library"
    own = importlib.import_module(name)
    with library(stock=True):
        del sys.modules[name]
        there = importlib.import_module(name)
    sys.modules[name] = own
    return there.ConfigError is ValueError and isinstance(there.WITHOUT_EXTRA_STATE, str)


def test_the_backend_goes_with_stock_too(ranks: RankPool) -> None:
    assert ranks(1)(stand_ins) == [True]


def test_readme_shows_the_script() -> None:
    body = SCRIPT.read_text().split('"""\n', 1)[1].strip()
    assert body in (ROOT / "README.md").read_text()
