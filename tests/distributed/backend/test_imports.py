"""What importing Megatron brings with it."""

from __future__ import annotations

import sys

from tests.rank_pool import RankPool


def loaded(*names: str) -> list[bool]:
    return [name in sys.modules for name in names]


def test_megatron_comes_without_torchs_compiler_once_the_cpu_is_selected(ranks: RankPool) -> None:
    """As in a run, and in the server that has imported all before it forks ranks."""
    (found,) = ranks(1)(loaded, "megatron.training.training", "torch._inductor.compile_fx")
    assert found == [True, False]
